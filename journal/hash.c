/* SPDX-License-Identifier: BSD-3-Clause */
/* XXH3 by way of libxxhash; see hash.h. */
#undef XXH_INLINE_ALL /* its functions are wanted, not the header's */

#include "hash.h"

#include <string.h>

#include <xxhash.h>
#if defined __x86_64__ || defined __i386__
#include <xxh_x86dispatch.h>
#endif

uint64_t
vr_hash64 (const void *data, size_t n)
{
  return XXH3_64bits (data, n);
}

void
vr_hash128 (const void *data, size_t n, uint8_t ret[16])
{
  XXH128_canonical_t canonical;

  XXH128_canonicalFromHash (&canonical, XXH3_128bits (data, n));
  memcpy (ret, canonical.digest, sizeof canonical.digest);
}
