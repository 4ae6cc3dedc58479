/* SPDX-License-Identifier: BSD-3-Clause */
/* Where `vmrep status` gets its figures.  Each collector appends one object
 * per VM to the array vms, or returns a negative errno with why filled in.
 * The keys are those of vmrep(8), "JSON".
 */
#ifndef VMREP_STATUS_H
#define VMREP_STATUS_H

#include <stddef.h>

#include "epoch.h"
#include "format.h"
#include "output.h"

/* From the shared epoch file of a primary. */
int collect_primary (const char *path, json_t *vms, char *why,
                     size_t why_size);

/* From a backup that serves: uri names a log, a VM, or nothing for all. */
int collect_backup (const char *uri, json_t *vms, char *why, size_t why_size);

/* From the folder of a backup, or of one VM of it. */
int collect_folder (const char *path, json_t *vms, char *why,
                    size_t why_size);

/* "complete", "copying" or "promoted": what a backup's image is good for. */
const char *image_state (uint32_t log_flags);

#endif /* VMREP_STATUS_H */
