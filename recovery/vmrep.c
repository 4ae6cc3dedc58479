/* SPDX-License-Identifier: BSD-3-Clause */
/* The command `vmrep`: its verbs, their options, their help. */
#include "vmrep.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "output.h"

#define OPTIONS_MAX 8
#define WATCH_DEFAULT_NS UINT64_C (1000000000)
#define WATCH_MAX_NS UINT64_C (86400000000000)

struct option_help {
  const char *name;
  int has_arg;     /* as for getopt_long */
  const char *arg; /* for help, with its brackets */
  const char *help;
  int key; /* 0: the end of a table */
};

static const struct option_help json_option
    = { "json", no_argument, "", "print one JSON object", 'j' };
static const struct option_help watch_option
    = { "watch", optional_argument, "[=SECONDS]",
        "again every SECONDS [1], with rates", 'w' };
static const struct option_help records_option
    = { "records", no_argument, "", "list every record that can be read",
        'r' };
static const struct option_help progress_option
    = { "progress", no_argument, "",
        "show progress even if stderr is no terminal", 'p' };
static const struct option_help help_option
    = { "help", no_argument, "", "show this help", 'h' };

struct verb {
  const char *name;
  const char *operands;
  const char *summary;
  const char *help;
  size_t min, max; /* operands */
  const struct option_help *option[OPTIONS_MAX];
  int (*run) (const struct cli_args *args);
};

static const struct verb verbs[] = {
  { "status", "TARGET...", "show how far replication is",
    "TARGET is the epoch file of a primary, the NBD URI of a backup\n"
    "(nbd://HOST for all its logs, nbd://HOST/VM/DISK for one), or a\n"
    "backup's folder DIR or DIR/VM when no server has it open.\n",
    1, SIZE_MAX, { &json_option, &watch_option, &help_option },
    run_status },
  { "promote", "DIR VM", "make a backup's images the disks, offline",
    "DIR is the folder of nbdkit vmrep-backup, which must be stopped.\n"
    "The primary must not run any more: nothing here can stop it.\n",
    2, 2, { &json_option, &help_option }, run_promote },
  { "inspect", "FILE", "explain a journal or an epoch file",
    "Changes nothing.  Exit status 3 if FILE is damaged.\n", 1, 1,
    { &json_option, &records_option, &help_option }, run_inspect },
  { "verify", "PRIMARY-URI BACKUP-URI",
    "compare both copies of a disk at one epoch",
    "PRIMARY-URI leads to nbdkit vmrep, BACKUP-URI to the log VM/DISK of\n"
    "nbdkit vmrep-backup.  The guest may go on.  Exit status 0: the same,\n"
    "3: different, 1: could not be compared.\n",
    2, 2, { &json_option, &progress_option, &help_option }, run_verify },
};
#define VERBS (sizeof verbs / sizeof verbs[0])

/* ---- Help --------------------------------------------------------------- */

static void
print_help (void)
{
  struct table t = { .columns = 2 };

  printf ("vmrep: replicated disks of QEMU guests\n\n"
          "usage: vmrep VERB [OPTION...] ...\n\n");
  for (size_t i = 0; i < VERBS; i++) {
    table_cell (&t, "%s %s", verbs[i].name, verbs[i].operands);
    table_cell (&t, "%s", verbs[i].summary);
  }
  table_print (&t, 2);
  printf ("\n  vmrep VERB --help  tells more; so does vmrep(8)\n"
          "  vmrep --version\n\n"
          "exit status: 0 done, 1 failed or refused, 2 usage, 3 difference "
          "or damage found\n");
}

static void
print_verb_help (const struct verb *v)
{
  struct table t = { .columns = 2 };

  printf ("usage: vmrep %s [OPTION...] %s\n\n%c%s.\n\n%s\n", v->name,
          v->operands, v->summary[0] - 'a' + 'A', v->summary + 1, v->help);
  for (size_t i = 0; v->option[i]; i++) {
    table_cell (&t, "--%s%s", v->option[i]->name, v->option[i]->arg);
    table_cell (&t, "%s", v->option[i]->help);
  }
  table_print (&t, 2);
}

/* ---- Parsing ------------------------------------------------------------ */

/* "0.5", "2s", "250ms". */
static int
parse_seconds (const char *text, uint64_t *ret_ns)
{
  char *end;
  double n, unit = 1e9;

  if (text == NULL) {
    *ret_ns = WATCH_DEFAULT_NS;
    return 0;
  }
  n = strtod (text, &end);
  if (strcmp (end, "ms") == 0)
    unit = 1e6;
  else if (*end && strcmp (end, "s") != 0)
    return -EINVAL;
  /* Also false for what is not a number. */
  if (end == text || !(n * unit >= 1e6 && n * unit <= (double) WATCH_MAX_NS))
    return -EINVAL;
  *ret_ns = (uint64_t) (n * unit);
  return 0;
}

static int
usage_error (const struct verb *v, const char *what, const char *arg)
{
  complain ("%s: %s%s; try 'vmrep %s --help'", v->name, what, arg, v->name);
  return VMREP_USAGE;
}

/* 0, an exit code, or -1 when help was printed. */
static int
take_option (const struct verb *v, int key, const char *arg,
             struct cli_args *args)
{
  switch (key) {
  case 'j':
    args->json = true;
    return 0;
  case 'r':
    args->records = true;
    return 0;
  case 'p':
    args->progress = true;
    return 0;
  case 'w':
    if (parse_seconds (arg, &args->watch_ns) < 0)
      return usage_error (v, "--watch takes a time from 1ms to 1 day, not ",
                          arg);
    return 0;
  case 'h':
    print_verb_help (v);
    return -1;
  default:
    return usage_error (v, "unknown, ambiguous or malformed option ", arg);
  }
}

static int
parse_options (const struct verb *v, int argc, char **argv,
               struct cli_args *args)
{
  struct option o[OPTIONS_MAX] = { 0 };
  int key, r = 0;

  for (size_t i = 0; v->option[i]; i++)
    o[i] = (struct option){ .name = v->option[i]->name,
                            .has_arg = v->option[i]->has_arg,
                            .val = v->option[i]->key };
  opterr = 0;
  while (r == 0 && (key = getopt_long (argc, argv, "", o, NULL)) != -1)
    r = take_option (v, key, key == '?' ? argv[optind - 1] : optarg, args);
  args->operand = argv + optind;
  args->count = (size_t) (argc - optind);
  return r;
}

static int
run_verb (const struct verb *v, int argc, char **argv)
{
  struct cli_args args = { 0 };
  int r = parse_options (v, argc, argv, &args);

  if (r != 0)
    return r < 0 ? VMREP_OK : r;
  if (args.count < v->min)
    return usage_error (v, "expected ", v->operands);
  if (args.count > v->max)
    return usage_error (v, "one operand too many: ", args.operand[v->max]);
  return v->run (&args);
}

static int
run (int argc, char **argv)
{
  const char *name = argc > 1 ? argv[1] : NULL;

  if (name == NULL) {
    complain ("what shall I do? try 'vmrep --help'");
    return VMREP_USAGE;
  }
  if (strcmp (name, "--help") == 0 || strcmp (name, "--version") == 0) {
    if (name[2] == 'h')
      print_help ();
    else
      printf ("vmrep %s\n", VMREP_VERSION);
    return VMREP_OK;
  }
  for (size_t i = 0; i < VERBS; i++)
    if (strcmp (name, verbs[i].name) == 0)
      return run_verb (&verbs[i], argc - 1, argv + 1);
  complain ("unknown %s '%s'; try 'vmrep --help'",
            name[0] == '-' ? "option" : "verb", name);
  return VMREP_USAGE;
}

int
main (int argc, char **argv)
{
  int r = run (argc, argv);

  /* Output that did not arrive is no success. */
  if (fflush (stdout) != 0 || ferror (stdout)) {
    complain ("cannot write the output: %m");
    return VMREP_FAILED;
  }
  return r;
}
