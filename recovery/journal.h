/* SPDX-License-Identifier: BSD-3-Clause */
/* A journal file as it lies there, recoverable or not: superblocks, and what
 * can be read of each segment.  Nothing is written or locked.
 */
#ifndef VMREP_JOURNAL_H
#define VMREP_JOURNAL_H

#include "io.h"
#include "log.h"

struct journal_supers {
  struct vr_super super[2];
  int err[2]; /* of vr_super_check, or of reading */
  const struct vr_super *newest; /* the valid one to believe; NULL: none */
};

/* Superblocks A and B.  Errors of opening the file; what is wrong with a
   block is in ret->err. */
int journal_read_supers (const char *path, struct journal_supers *ret);

/* One slot of the circular file. */
struct journal_segment {
  uint64_t slot;
  uint64_t file_offset;
  bool blank; /* never written */
  bool valid; /* the header is; else nothing below is known */
  struct vr_segment header;
  uint64_t number;  /* of the segment */
  uint64_t end_lsn; /* behind the last valid record */
  uint64_t end_chain;
  uint64_t records;
  uint64_t first_epoch, last_epoch; /* 0: no records */
  const char *problem; /* what ends the records, or NULL at the segment's
                          very end */
  uint64_t damaged_payloads;
  uint64_t damaged_lsn; /* of the first of them */
};

/* Visited for each valid record: the record, and whether its payload is
   whole. */
typedef void (*journal_record_fn) (void *opaque, const struct vr_record *r,
                                   bool payload_ok);

/* Read a slot into buf, of s->segment_size bytes, and follow its records.
   fn may be NULL.  Errors of reading. */
int journal_read_segment (struct vr_file *f, const struct vr_super *s,
                          uint64_t slot, void *buf, journal_record_fn fn,
                          void *opaque, struct journal_segment *ret);

/* Where lsn lies in the file. */
uint64_t journal_file_offset (const struct vr_super *s, uint64_t lsn);

#endif /* VMREP_JOURNAL_H */
