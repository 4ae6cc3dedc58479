/* SPDX-License-Identifier: BSD-3-Clause */
#include <stdarg.h>
#include <stdio.h>

#include "memsync/problem.h"

int
vr_problem (struct vr_problem *p, int err, const char *format, ...)
{
  va_list args;

  if (!p)
    return err;
  va_start (args, format);
  vsnprintf (p->text, sizeof p->text, format, args);
  va_end (args);
  return err;
}
