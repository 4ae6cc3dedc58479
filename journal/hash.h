/* SPDX-License-Identifier: BSD-3-Clause */
/* XXH3 of large inputs, with the widest vectors this processor has.
 *
 * The hash of a record's header (56 bytes) is inlined where it is needed; the
 * one of a payload is worth a call into libxxhash, whose dispatching variant
 * chooses AVX2 or AVX-512 at run time.  Both give the same values.
 */
#ifndef VR_HASH_H
#define VR_HASH_H

#include <stddef.h>
#include <stdint.h>

/* XXH3-64, seed 0. */
uint64_t vr_hash64 (const void *data, size_t n);

/* XXH3-128 in canonical (big-endian) form. */
void vr_hash128 (const void *data, size_t n, uint8_t ret[16]);

#endif /* VR_HASH_H */
