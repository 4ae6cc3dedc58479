/* SPDX-License-Identifier: BSD-3-Clause */
/* What the command prints: tables and figures for people, JSON, errors. */
#ifndef VMREP_OUTPUT_H
#define VMREP_OUTPUT_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

/* "vmrep: …" and a newline on stderr. */
void complain (const char *fmt, ...) __attribute__ ((format (printf, 1, 2)));

/* Out of memory is the end of the command. */
void *must (void *allocated);
char *text_of (const char *fmt, ...) __attribute__ ((format (printf, 1, 2)));

/* A figure with its unit: "4.0 KiB", "12 ms".  Good until the eighth call
   from now. */
const char *bytes_text (uint64_t bytes);
const char *seconds_text (double seconds);

/* p as one word of a shell's command line.  To be freed. */
char *shell_word (const char *p);

/* ---- JSON --------------------------------------------------------------- */

/* Shorter names for what every verb does.  set_… replace; the getters give 0
   or "" for what is not there or of another type. */
void set_text (json_t *o, const char *key, const char *value);
void set_count (json_t *o, const char *key, uint64_t value);
void set_bool (json_t *o, const char *key, bool value);
void set_real (json_t *o, const char *key, double value);
void set_hex (json_t *o, const char *key, const void *bytes, size_t n);
/* Take over the reference to value. */
void set_json (json_t *o, const char *key, json_t *value);
void append_json (json_t *array, json_t *value);

const char *get_text (const json_t *o, const char *key);
uint64_t get_count (const json_t *o, const char *key);
bool get_bool (const json_t *o, const char *key);
double get_real (const json_t *o, const char *key);
/* For printf's %llu. */
#define LLU(o, key) ((unsigned long long) get_count (o, key))
bool has_value (const json_t *o, const char *key); /* there and not null */

/* Print o and a newline; one_line as told, else indented. */
void print_json (const json_t *o, bool one_line);

/* ---- Tables ------------------------------------------------------------- */

/* Columns as wide as their widest cell, two spaces between them. */
struct table {
  unsigned columns;
  char **cell;
  size_t count, allocated;
};

/* The next cell, left to right, row by row. */
void table_cell (struct table *t, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

/* Print it, each row behind indent spaces, and forget it. */
void table_print (struct table *t, unsigned indent);

#endif /* VMREP_OUTPUT_H */
