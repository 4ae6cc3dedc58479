/* SPDX-License-Identifier: BSD-3-Clause */
/* See journal.h; the format is that of journal/format.h. */
#include "journal.h"

#include <errno.h>
#include <string.h>

int
journal_read_supers (const char *path, struct journal_supers *ret)
{
  static const uint64_t place[2] = { VR_SUPER_A, VR_SUPER_B };
  struct vr_io *io = vr_io_real ();
  struct vr_file *f;
  int err = io->ops->open (io, path, VR_OPEN_READ_ONLY, &f);

  if (err < 0)
    return err;
  memset (ret, 0, sizeof *ret);
  for (size_t i = 0; i < 2; i++) {
    struct vr_super *s = &ret->super[i];

    ret->err[i] = vr_read (f, s, sizeof *s, place[i]);
    if (ret->err[i] == 0)
      ret->err[i] = vr_super_check (s);
    if (ret->err[i] == 0
        && (ret->newest == NULL || s->sequence > ret->newest->sequence))
      ret->newest = s;
  }
  vr_close (f);
  return 0;
}

uint64_t
journal_file_offset (const struct vr_super *s, uint64_t lsn)
{
  return VR_DATA_START
         + lsn / s->segment_size % s->segment_count * s->segment_size
         + lsn % s->segment_size;
}

static bool
is_blank (const uint8_t *header)
{
  for (size_t i = 0; i < VR_SEGMENT_HEADER; i++)
    if (header[i])
      return false;
  return true;
}

/* Note a valid record. */
static void
note_record (struct journal_segment *g, const struct vr_record *r,
             bool payload_ok)
{
  if (g->records++ == 0)
    g->first_epoch = r->epoch;
  g->last_epoch = r->epoch;
  g->end_lsn = r->lsn + vr_record_size (r->payload_size);
  g->end_chain = r->hash;
  if (!payload_ok && g->damaged_payloads++ == 0)
    g->damaged_lsn = r->lsn;
}

/* Headers are chained without their payloads, so records behind a damaged
   payload can still be told to be ours. */
static void
follow_records (const struct vr_super *s, const uint8_t *buf,
                journal_record_fn fn, void *opaque,
                struct journal_segment *g)
{
  uint64_t end = (g->number + 1) * s->segment_size;

  while (g->end_lsn < end) {
    const struct vr_record *r
        = (const void *) (buf + g->end_lsn % s->segment_size);
    bool ok;

    g->problem = vr_record_problem (r, g->end_lsn, end, s->disk_size);
    if (g->problem == NULL && vr_record_chain (r, g->end_chain) != r->hash)
      g->problem = "record hash does not match";
    if (g->problem)
      return;
    ok = r->kind != VR_WRITE
         || vr_payload_hash (r + 1, r->payload_size) == r->payload_hash;
    note_record (g, r, ok);
    if (fn)
      fn (opaque, r, ok);
  }
}

int
journal_read_segment (struct vr_file *f, const struct vr_super *s,
                      uint64_t slot, void *buf, journal_record_fn fn,
                      void *opaque, struct journal_segment *g)
{
  int err;

  memset (g, 0, sizeof *g);
  g->slot = slot;
  g->file_offset = VR_DATA_START + slot * s->segment_size;
  err = vr_read (f, buf, s->segment_size, g->file_offset);
  if (err < 0)
    return err;
  memcpy (&g->header, buf, sizeof g->header);
  g->blank = is_blank (buf);
  g->number = g->header.lsn / s->segment_size;
  g->valid = g->header.lsn % s->segment_size == 0
             && g->number % s->segment_count == slot
             && vr_segment_ok (&g->header, s->log_id, g->header.lsn);
  if (!g->valid)
    return 0;
  g->end_lsn = g->header.lsn + VR_SEGMENT_HEADER;
  g->end_chain = g->header.checksum;
  follow_records (s, buf, fn, opaque, g);
  return 0;
}
