/* SPDX-License-Identifier: BSD-3-Clause */
/* See output.h. */
#include "output.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmrep.h"

#define TEXTS 8
#define TEXT_SIZE 32

void
complain (const char *fmt, ...)
{
  va_list args;

  fflush (stdout);
  va_start (args, fmt);
  fputs ("vmrep: ", stderr);
  vfprintf (stderr, fmt, args);
  fputc ('\n', stderr);
  va_end (args);
}

void *
must (void *allocated)
{
  if (allocated == NULL) {
    complain ("out of memory");
    exit (VMREP_FAILED);
  }
  return allocated;
}

static char *
vtext (const char *fmt, va_list args)
{
  char *s;

  return must (vasprintf (&s, fmt, args) < 0 ? NULL : s);
}

char *
text_of (const char *fmt, ...)
{
  va_list args;
  char *s;

  va_start (args, fmt);
  s = vtext (fmt, args);
  va_end (args);
  return s;
}

/* One of a few buffers in turn, so that several fit one printf. */
static char *
next_text (void)
{
  static char text[TEXTS][TEXT_SIZE];
  static unsigned next;

  return text[next++ % TEXTS];
}

const char *
bytes_text (uint64_t bytes)
{
  static const char unit[][4] = { "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
  char *s = next_text ();
  double n = (double) bytes / 1024;
  size_t i = 0;

  if (bytes < 1024) {
    snprintf (s, TEXT_SIZE, "%d B", (int) bytes);
    return s;
  }
  while (n >= 1023.95 && i + 1 < sizeof unit / sizeof unit[0]) {
    n /= 1024;
    i++;
  }
  snprintf (s, TEXT_SIZE, "%.1f %s", n, unit[i]);
  return s;
}

const char *
seconds_text (double seconds)
{
  char *s = next_text ();

  if (seconds < 0.01)
    snprintf (s, TEXT_SIZE, "%.1f ms", seconds * 1000);
  else if (seconds < 1)
    snprintf (s, TEXT_SIZE, "%.0f ms", seconds * 1000);
  else if (seconds < 100)
    snprintf (s, TEXT_SIZE, "%.1f s", seconds);
  else
    snprintf (s, TEXT_SIZE, "%.0f s", seconds);
  return s;
}

char *
shell_word (const char *p)
{
  static const char plain[]
      = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
        "/._-+=:,@%";
  char *s, *to;

  if (p[0] && p[strspn (p, plain)] == 0)
    return must (strdup (p));
  s = to = must (malloc (4 * strlen (p) + 3));
  *to++ = '\'';
  for (; *p; p++)
    if (*p == '\'')
      to = stpcpy (to, "'\\''");
    else
      *to++ = *p;
  strcpy (to, "'");
  return s;
}

/* ---- JSON --------------------------------------------------------------- */

void
set_json (json_t *o, const char *key, json_t *value)
{
  if (json_object_set_new (o, key, must (value)) < 0)
    must (NULL);
}

void
append_json (json_t *array, json_t *value)
{
  if (json_array_append_new (array, must (value)) < 0)
    must (NULL);
}

/* Bytes from a file or from the network need not be UTF-8. */
void
set_text (json_t *o, const char *key, const char *value)
{
  json_t *v = json_string (value);

  if (v == NULL) {
    char *ascii = must (strdup (value));

    for (char *p = ascii; *p; p++)
      if (*p & 0x80)
        *p = '?';
    v = json_string (ascii);
    free (ascii);
  }
  set_json (o, key, v);
}

void
set_count (json_t *o, const char *key, uint64_t value)
{
  set_json (o, key, json_integer ((json_int_t) value));
}

void
set_bool (json_t *o, const char *key, bool value)
{
  set_json (o, key, json_boolean (value));
}

/* Microseconds are enough for whatever we measure. */
void
set_real (json_t *o, const char *key, double value)
{
  double whole = (double) (int64_t) (value * 1e6 + (value < 0 ? -0.5 : 0.5));

  set_json (o, key, json_real (whole / 1e6));
}

void
set_hex (json_t *o, const char *key, const void *bytes, size_t n)
{
  const uint8_t *b = bytes;
  char *hex = must (malloc (2 * n + 1));

  hex[0] = 0;
  for (size_t i = 0; i < n; i++)
    sprintf (hex + 2 * i, "%02x", b[i]);
  set_text (o, key, hex);
  free (hex);
}

const char *
get_text (const json_t *o, const char *key)
{
  const char *s = json_string_value (json_object_get (o, key));

  return s ? s : "";
}

uint64_t
get_count (const json_t *o, const char *key)
{
  return (uint64_t) json_integer_value (json_object_get (o, key));
}

bool
get_bool (const json_t *o, const char *key)
{
  return json_is_true (json_object_get (o, key));
}

double
get_real (const json_t *o, const char *key)
{
  return json_number_value (json_object_get (o, key));
}

bool
has_value (const json_t *o, const char *key)
{
  const json_t *v = json_object_get (o, key);

  return v && !json_is_null (v);
}

void
print_json (const json_t *o, bool one_line)
{
  json_dumpf (o, stdout,
              (one_line ? JSON_COMPACT : JSON_INDENT (2))
                  | JSON_REAL_PRECISION (15));
  putchar ('\n');
  fflush (stdout);
}

/* ---- Tables ------------------------------------------------------------- */

void
table_cell (struct table *t, const char *fmt, ...)
{
  va_list args;

  if (t->count == t->allocated) {
    t->allocated = t->allocated ? 2 * t->allocated : 64;
    t->cell = must (
        reallocarray (t->cell, t->allocated, sizeof *t->cell));
  }
  va_start (args, fmt);
  t->cell[t->count++] = vtext (fmt, args);
  va_end (args);
}

static int
column_width (const struct table *t, unsigned column)
{
  size_t width = 0;

  for (size_t i = column; i < t->count; i += t->columns)
    if (strlen (t->cell[i]) > width)
      width = strlen (t->cell[i]);
  return (int) width;
}

void
table_print (struct table *t, unsigned indent)
{
  int *width = must (calloc (t->columns, sizeof *width));

  for (unsigned c = 0; c < t->columns; c++)
    width[c] = column_width (t, c);
  for (size_t i = 0; i < t->count; i++) {
    unsigned c = (unsigned) (i % t->columns);

    if (c == 0)
      printf ("%*s", (int) indent, "");
    if (c + 1 == t->columns)
      printf ("%s\n", t->cell[i]);
    else
      printf ("%-*s  ", width[c], t->cell[i]);
    free (t->cell[i]);
  }
  free (width);
  free (t->cell);
  *t = (struct table){ .columns = t->columns };
}
