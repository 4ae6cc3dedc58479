/* SPDX-License-Identifier: BSD-3-Clause */
/* Preloaded into nbdkit for the address sanitizer's runs.
 *
 * At exit p11-kit, which nbdkit loads by way of GnuTLS, frees a locale object
 * from a destructor, after the sanitizer's runtime has taken itself down; the
 * process then hangs for ever, plain nbdkit with its own plugins too.  What is
 * not freed at exit is nobody's loss.
 */
#include <locale.h>

__attribute__ ((visibility ("default"))) void
freelocale (locale_t locale)
{
  (void) locale;
}
