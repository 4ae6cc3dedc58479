/* SPDX-License-Identifier: BSD-3-Clause */
/* The command `vmrep`: what its verbs share.
 *
 *   vmrep.c          the table of verbs, options, help
 *   status.c         vmrep status, from
 *     primary.c        a primary's epoch file,
 *     backup.c         a backup's log exports,
 *     folder.c         a backup's folder, offline
 *   promote.c        vmrep promote
 *   inspect.c        vmrep inspect, of epoch files, and with
 *     inspect-journal.c  what it tells of a journal,
 *     journal.c          as read by this
 *   verify.c         vmrep verify, with
 *     rounds.c         one pair of views at one epoch
 *   client.c         NBD with deadlines
 *   output.c         tables, sizes, JSON, errors
 *
 * A verb collects what it found in a JSON object and prints that, with --json
 * as it is and else for people: so both always tell the same.
 */
#ifndef VMREP_H
#define VMREP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Exit codes; see vmrep(8). */
enum {
  VMREP_OK = 0,
  VMREP_FAILED = 1, /* or refused */
  VMREP_USAGE = 2,
  VMREP_FOUND = 3, /* verify: a difference; inspect: damage */
};

/* A verb's command line, parsed. */
struct cli_args {
  bool json;
  bool records;
  bool progress;
  uint64_t watch_ns; /* 0: once */
  size_t count;
  char **operand;
};

/* The verbs.  Each reports its errors and returns an exit code. */
int run_status (const struct cli_args *args);
int run_promote (const struct cli_args *args);
int run_inspect (const struct cli_args *args);
int run_verify (const struct cli_args *args);

#endif /* VMREP_H */
