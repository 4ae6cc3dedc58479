/* SPDX-License-Identifier: BSD-3-Clause */
/* Whatever the bytes say, a decoder of pages stays inside the image.
 *
 * The blocks of the image are allocations of their own, so that the address
 * sanitizer sees a step over any edge.
 */
#include <stdlib.h>
#include <string.h>

#include "memsync/delta.h"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

/* Refused payloads change nothing, so an apply that fails must fail before
   its first callback. */
static unsigned calls;

static int
write_counted (void *opaque, uint32_t block, uint64_t offset,
               const void *data, uint32_t length)
{
  calls++;
  return vr_delta_write_mapped (opaque, block, offset, data, length);
}

static int
zero_counted (void *opaque, uint32_t block, uint64_t offset, uint64_t length)
{
  calls++;
  return vr_delta_zero_mapped (opaque, block, offset, length);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  static const uint64_t pages[] = { 3, 0, 70, 1 };
  const struct vr_ram_layout layout = { 4, pages };
  uint8_t *image[4], *scratch = malloc (VR_DELTA_BODY_MAX);
  const struct vr_delta_apply apply = { write_counted, zero_counted, image };
  int checked, err;

  for (int i = 0; i < 4; i++)
    image[i] = calloc (pages[i] + 1, VR_PAGE_SIZE);
  for (int i = 0; i < 4; i++)
    image[i] = realloc (image[i], pages[i] * VR_PAGE_SIZE + (pages[i] == 0));

  calls = 0;
  checked = vr_delta_decode (data, size, &layout, scratch, NULL);
  err = vr_delta_decode (data, size, &layout, scratch, &apply);
  if (checked != err || (err < 0 && calls > 0))
    abort ();

  for (int i = 0; i < 4; i++)
    free (image[i]);
  free (scratch);
  return 0;
}
