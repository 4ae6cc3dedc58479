/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep inspect of a journal, in a file of its own. */
#ifndef VMREP_INSPECT_H
#define VMREP_INSPECT_H

#include "vmrep.h"

/* Print all about the journal at path; an exit code. */
int inspect_journal (const struct cli_args *args, const char *path);

#endif /* VMREP_INSPECT_H */
