/* SPDX-License-Identifier: BSD-3-Clause */
/* Checks and hashes of the on-disk structures; see format.h. */
#include "format.h"

#include <errno.h>
#include <string.h>

#include <xxhash.h>

#include "hash.h"

#define CHECKSUM_AT (VR_BLOCK - sizeof (uint64_t))

void
vr_block_seal (void *block)
{
  uint64_t sum = XXH3_64bits (block, CHECKSUM_AT);
  memcpy ((char *) block + CHECKSUM_AT, &sum, sizeof sum);
}

bool
vr_block_ok (const void *block, const char *magic)
{
  uint64_t sum;

  if (memcmp (block, magic, 8) != 0)
    return false;
  memcpy (&sum, (const char *) block + CHECKSUM_AT, sizeof sum);
  return sum == XXH3_64bits (block, CHECKSUM_AT);
}

static bool
power_of_two (uint64_t n)
{
  return n != 0 && (n & (n - 1)) == 0;
}

static bool
all_zero (const void *p, size_t n)
{
  const uint8_t *byte = p;

  for (size_t i = 0; i < n; i++)
    if (byte[i] != 0)
      return false;
  return true;
}

static bool
terminated (const char name[VR_NAME_SIZE])
{
  return memchr (name, 0, VR_NAME_SIZE) != NULL;
}

/* Positions and epochs of a superblock must be in order. */
static bool
positions_possible (const struct vr_super *s)
{
  return s->applied_lsn >= s->segment_size
         && s->applied_lsn <= s->committed_lsn
         && s->committed_lsn < VR_LSN_MAX
         && s->applied_epoch <= s->committed_epoch
         && s->committed_epoch < s->epoch_limit
         && s->epoch_limit < 2 * VR_EPOCH_MAX
         && s->applied_lsn % VR_RECORD_ALIGN == 0
         && s->committed_lsn % VR_RECORD_ALIGN == 0;
}

int
vr_super_check (const struct vr_super *s)
{
  if (!vr_block_ok (s, VR_SUPER_MAGIC))
    return -EBADMSG;
  if (s->version != VR_VERSION || s->incompat != 0)
    return -EPROTO;
  if (s->flags & ~(uint32_t) VR_LOG_FLAGS)
    return -EPROTO;
  if (!power_of_two (s->segment_size) || s->segment_size < VR_SEGMENT_MIN
      || s->segment_size > VR_SEGMENT_MAX
      || s->segment_count < VR_SEGMENTS_MIN
      || s->segment_count > VR_SEGMENTS_MAX
      || s->disk_size >= VR_LSN_MAX || !positions_possible (s)
      || !terminated (s->vm) || !terminated (s->disk) || s->copied != 0
      || !all_zero (s->reserved, sizeof s->reserved))
    return -EUCLEAN;
  return 0;
}

void
vr_segment_seal (struct vr_segment *s)
{
  s->checksum = XXH3_64bits (s, offsetof (struct vr_segment, checksum));
}

bool
vr_segment_ok (const struct vr_segment *s, const uint8_t log_id[16],
               uint64_t lsn)
{
  return memcmp (s->magic, VR_SEGMENT_MAGIC, 8) == 0
         && s->version == VR_VERSION && s->reserved0 == 0
         && memcmp (s->log_id, log_id, 16) == 0 && s->lsn == lsn
         && all_zero (s->reserved, sizeof s->reserved)
         && s->checksum
                == XXH3_64bits (s, offsetof (struct vr_segment, checksum));
}

uint64_t
vr_payload_hash (const void *payload, size_t n)
{
  return vr_hash64 (payload, n);
}

uint64_t
vr_record_chain (const struct vr_record *r, uint64_t chain)
{
  return XXH3_64bits_withSeed ((const char *) r + sizeof r->hash,
                               sizeof *r - sizeof r->hash, chain);
}

/* Fields that depend on the kind. */
static const char *
kind_problem (const struct vr_record *r, uint64_t disk_size)
{
  switch (r->kind) {
  case VR_PAD:
    if (r->offset || r->length || r->payload_hash || r->flags)
      return "pad record with a field that must be 0";
    return NULL;
  case VR_SEAL:
    if (r->payload_size || r->payload_hash || r->flags)
      return "seal record with a field that must be 0";
    return NULL;
  case VR_WRITE:
    if (r->payload_size != r->length)
      return "write record whose payload is not its length";
    break;
  case VR_ZERO:
  case VR_TRIM:
    if (r->payload_size || r->payload_hash)
      return "zero or trim record with payload";
    break;
  default:
    return "unknown record kind";
  }
  if (r->length == 0)
    return "empty range";
  if (r->offset > disk_size || r->length > disk_size - r->offset)
    return "range beyond the end of the disk";
  return NULL;
}

const char *
vr_record_problem (const struct vr_record *r, uint64_t lsn,
                   uint64_t segment_end, uint64_t disk_size)
{
  if (r->lsn != lsn)
    return "record of another position";
  if (r->flags & ~VR_RECORD_FLAGS)
    return "unknown record flag";
  if (r->epoch >= VR_EPOCH_MAX)
    return "impossible epoch";
  if (r->kind != VR_PAD && r->payload_size > VR_PAYLOAD_MAX)
    return "payload too large";
  if (vr_record_size (r->payload_size) > segment_end - lsn)
    return "record passes the end of its segment";
  return kind_problem (r, disk_size);
}

bool
vr_name_ok (const char *name)
{
  static const char allowed[]
      = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  size_t n = strlen (name);

  return n > 0 && n < VR_NAME_SIZE && strspn (name, allowed) == n
         && name[0] != '.' && name[0] != '-';
}

const char *
vr_kind_name (unsigned kind)
{
  static const char *const names[]
      = { [VR_PAD] = "pad",       [VR_WRITE] = "write",
          [VR_ZERO] = "zero",     [VR_TRIM] = "trim",
          [VR_SEAL] = "seal",     [VR_JOIN] = "join",
          [VR_LEAVE] = "leave",   [VR_PAGES] = "pages",
          [VR_VMSTATE] = "vmstate", [VR_LAYOUT] = "layout" };

  if (kind < sizeof names / sizeof names[0] && names[kind])
    return names[kind];
  return "?";
}
