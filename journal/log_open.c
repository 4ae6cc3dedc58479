/* SPDX-License-Identifier: BSD-3-Clause */
/* Create and recover a journal file; see log.h and format.h. */
#include "log_internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SEGMENT_LARGEST (UINT64_C (4) << 20)
#define SEGMENT_SMALLEST (UINT64_C (256) << 10)

int
vr_log_geometry (uint64_t size, uint64_t *ret_segment_size,
                 uint64_t *ret_segment_count)
{
  uint64_t segment = SEGMENT_LARGEST;

  if (size < VR_JOURNAL_MIN || size > VR_JOURNAL_MAX)
    return -EINVAL;
  /* At least 32 of them, so that recycling one frees a small part only. */
  while (segment > SEGMENT_SMALLEST && size / segment < 32)
    segment /= 2;
  *ret_segment_size = segment;
  *ret_segment_count = size / segment;
  return 0;
}

/* ---- Create ------------------------------------------------------------- */

static int
init_super (struct vr_io *io, const struct vr_log_config *c,
            struct vr_super *s)
{
  static const uint8_t none[16];
  int err = 0;

  *s = (struct vr_super){
    .version = VR_VERSION,
    .flags = c->flags,
    .sequence = 2, /* even: superblock A */
    .generation = c->generation,
    .disk_size = c->disk_size,
    .segment_size = c->segment_size,
    .segment_count = c->segment_count,
    .committed_lsn = c->start.lsn,
    .committed_chain = c->start.chain,
    .applied_lsn = c->start.lsn,
    .applied_chain = c->start.chain,
    .epoch_limit = c->epoch_limit,
  };
  memcpy (s->magic, VR_SUPER_MAGIC, 8);
  memcpy (s->vm_id, c->vm_id, 16);
  memcpy (s->log_id, c->log_id, 16);
  snprintf (s->vm, sizeof s->vm, "%s", c->vm);
  snprintf (s->disk, sizeof s->disk, "%s", c->disk);
  if (memcmp (s->log_id, none, 16) == 0)
    err = io->ops->random (io, s->log_id, 16);
  if (err == 0) {
    vr_block_seal (s);
    err = vr_super_check (s);
  }
  return err < 0 ? err : 0;
}

/* Write every block once: later writes then change no metadata, which makes
   an fdatasync half as expensive (measured: 134 against 196 us growing, 259
   preallocated only). */
static int
write_blank (struct vr_file *f, uint64_t size)
{
  size_t piece = 1 << 20;
  void *zeros = aligned_alloc (VR_BLOCK, piece);
  int err = 0;

  if (zeros == NULL)
    return -ENOMEM;
  memset (zeros, 0, piece);
  for (uint64_t at = 0; at < size && err == 0; at += piece)
    err = vr_write (f, zeros, size - at < piece ? size - at : piece, at);
  free (zeros);
  return err;
}

static int
write_new (struct vr_io *io, const char *path, const struct vr_log_config *c)
{
  _Alignas (VR_BLOCK) struct vr_super super;
  struct vr_file *f;
  int err;

  err = init_super (io, c, &super);
  if (err < 0)
    return err;
  err = io->ops->open (io, path, VR_OPEN_CREATE | VR_OPEN_DIRECT, &f);
  if (err < 0)
    return err;
  err = write_blank (f, VR_DATA_START + c->segment_size * c->segment_count);
  if (err == 0)
    err = vr_write (f, &super, sizeof super, VR_SUPER_A);
  if (err == 0)
    err = vr_sync (f);
  vr_close (f);
  return err;
}

/* "a/b" → "a", "b" → ".". */
static char *
directory_of (const char *path)
{
  const char *slash = strrchr (path, '/');

  if (slash == NULL)
    return strdup (".");
  if (slash == path)
    return strdup ("/");
  return strndup (path, (size_t) (slash - path));
}

int
vr_log_create (struct vr_io *io, const char *path,
               const struct vr_log_config *c)
{
  char *tmp = NULL, *dir = directory_of (path);
  struct vr_file *there;
  int err = 0;

  if (dir == NULL || asprintf (&tmp, "%s.new", path) < 0) {
    free (dir);
    return -ENOMEM;
  }
  if (io->ops->open (io, path, VR_OPEN_READ_ONLY, &there) == 0) {
    vr_close (there);
    err = -EEXIST;
  }
  if (err == 0) {
    /* Left over from a creation that a crash cut short. */
    io->ops->unlink (io, tmp);
    err = write_new (io, tmp, c);
    if (err == 0)
      err = io->ops->rename (io, tmp, path);
    if (err == 0)
      err = io->ops->sync_dir (io, dir);
    else
      io->ops->unlink (io, tmp);
  }
  free (tmp);
  free (dir);
  return err;
}

/* ---- Open --------------------------------------------------------------- */

static int
problem_at (struct vr_log_problem *p, uint64_t file_offset, int err,
            const char *fmt, ...)
{
  va_list args;

  p->file_offset = file_offset;
  va_start (args, fmt);
  vsnprintf (p->text, sizeof p->text, fmt, args);
  va_end (args);
  return err;
}

/* The newest valid superblock.  One that is unreadable for its version or
   impossible contents is an error even if the other one is fine: it was the
   newer one's writer who knew more. */
static int
read_super (struct vr_file *f, struct vr_super *ret,
            struct vr_log_problem *problem)
{
  static const uint64_t places[] = { VR_SUPER_A, VR_SUPER_B };
  _Alignas (VR_BLOCK) struct vr_super s;
  bool found = false;

  for (size_t i = 0; i < 2; i++) {
    int err = vr_read (f, &s, sizeof s, places[i]);

    if (err == -ENODATA)
      return problem_at (problem, places[i], -EBADMSG,
                         "too short to be a journal");
    if (err < 0)
      return err;
    err = vr_super_check (&s);
    if (err == -EPROTO)
      return problem_at (problem, places[i], err,
                         "superblock of format version %u, this program "
                         "knows version %u",
                         s.version, VR_VERSION);
    if (err == -EUCLEAN)
      return problem_at (problem, places[i], err,
                         "superblock with impossible contents");
    if (err == 0 && (!found || s.sequence > ret->sequence)) {
      *ret = s;
      found = true;
    }
  }
  if (!found)
    return problem_at (problem, VR_SUPER_A, -EBADMSG,
                       "no valid superblock: not a journal, or damaged");
  return 0;
}

/* Where lsn lies in the file. */
static uint64_t
file_offset (const struct vr_log *log, uint64_t lsn)
{
  return slot_offset (log, segment_number (log, lsn))
         + lsn % log->segment_size;
}

/* What recovery learns on its way along the chain. */
struct recovery {
  struct vr_walk walk;
  struct vr_seal open_seal; /* seen, its padding not yet */
  struct vr_mark before_seal;
  uint64_t epoch_before_seal;
  bool committed_seen;
};

/* A record behind the commit point, or a seal's padding.  *before is where
   the walk was. */
static int
note_record (struct vr_log *log, struct recovery *rec,
             const struct vr_record *r, const struct vr_mark *before)
{
  const struct vr_mark *at = &rec->walk.at;

  if (r->kind == VR_SEAL) {
    rec->open_seal = (struct vr_seal){ .epoch = r->epoch, .start = r->lsn,
                                       .time = r->offset };
    rec->before_seal = *before;
    rec->epoch_before_seal = log->open_epoch;
  }
  log->open_epoch = r->epoch;
  if (rec->open_seal.epoch == 0 || at->lsn % VR_BLOCK != 0)
    return 0;
  rec->open_seal.lsn = at->lsn;
  rec->open_seal.chain = at->chain;
  log->sealed_epoch = rec->open_seal.epoch;
  log->sealed_lsn = at->lsn;
  if (at->lsn > log->super.committed_lsn) {
    int err = vr_log_push_seal_locked (log, &rec->open_seal);

    if (err < 0)
      return err;
  }
  rec->open_seal.epoch = 0;
  return 0;
}

/* Are we at the commit point, in the right state? */
static void
check_commit_point (struct vr_log *log, struct recovery *rec)
{
  if (rec->walk.at.lsn == log->super.committed_lsn
      && rec->walk.at.chain == log->super.committed_chain)
    rec->committed_seen = true;
}

/* The log ends here.  A seal whose padding was lost is no seal, and cut off
   too; *ret_erase if its header must not be found again. */
static void
end_log (struct vr_log *log, struct recovery *rec, bool *ret_erase)
{
  if (rec->open_seal.epoch) {
    *ret_erase = rec->before_seal.lsn == rec->open_seal.start;
    rec->walk.at = rec->before_seal;
    log->open_epoch = rec->epoch_before_seal;
  }
  log->head = rec->walk.at.lsn;
  log->head_chain = rec->walk.at.chain;
}

/* Walk from the applied mark to the end of what is valid. */
static int
recover (struct vr_log *log, struct vr_log_problem *problem, bool *ret_erase)
{
  struct recovery rec = { .walk = { .log = log, .at = log->applied } };
  const struct vr_record *r;
  const uint8_t *payload;
  struct vr_mark before = log->applied;
  int err;

  check_commit_point (log, &rec);
  while ((err = vr_walk_step (&rec.walk, VR_LSN_MAX, &r, &payload)) == 1) {
    err = note_record (log, &rec, r, &before);
    if (err < 0)
      break;
    before = rec.walk.at;
    check_commit_point (log, &rec);
    if (!rec.committed_seen && rec.walk.at.lsn > log->super.committed_lsn)
      break;
  }
  if (err >= 0 && !rec.committed_seen)
    err = problem_at (problem, file_offset (log, rec.walk.at.lsn), -EUCLEAN,
                      "committed epoch %llu is damaged: %s (at LSN %llu, "
                      "committed to %llu)",
                      (unsigned long long) log->super.committed_epoch,
                      rec.walk.problem ? rec.walk.problem
                                       : "chain does not lead to the commit "
                                         "point",
                      (unsigned long long) rec.walk.at.lsn,
                      (unsigned long long) log->super.committed_lsn);
  if (err == 0 || err == 1) {
    err = 0;
    end_log (log, &rec, ret_erase);
  }
  vr_walk_end (&rec.walk);
  return err;
}

/* Have the segment that head is in as the tip. */
static int
load_tip (struct vr_log *log)
{
  struct vr_segbuf *s;
  int err;

  if (log->head % log->segment_size == 0)
    return 0;
  err = vr_segbuf_load (log, segment_number (log, log->head), &s);
  if (err < 0)
    return err;
  /* In memory payloads are not checked again: a torn record that recovery
     has just cut off would pass for a good one. */
  memset (s->data + log->head % log->segment_size, 0,
          log->segment_size - log->head % log->segment_size);
  s->used = log->head;
  log->tip = s;
  return vr_segbuf_cache_locked (log, s);
}

/* Take what was cut off at head out of the file.  Nobody was promised what
   shares the block with it: before a promise the log is padded. */
static int
erase_at_head (struct vr_log *log)
{
  uint64_t block = align_down (log->head % log->segment_size, VR_BLOCK);

  return vr_write (log->file, log->tip->data + block, VR_BLOCK,
                   slot_offset (log, log->tip->number) + block);
}

static int
alloc_log (struct vr_io *io, const char *path,
           const struct vr_log_open_options *o, struct vr_log **ret)
{
  struct vr_log *log = calloc (1, sizeof *log);
  pthread_condattr_t attr;

  if (log == NULL)
    return -ENOMEM;
  log->io = io;
  log->read_only = o->read_only;
  log->cache_slots = o->cache_segments < 2 ? 2 : o->cache_segments;
  log->path = strdup (path);
  log->cache = calloc (log->cache_slots, sizeof *log->cache);
  pthread_mutex_init (&log->mutex, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&log->changed, &attr);
  pthread_condattr_destroy (&attr);
  if (log->path == NULL || log->cache == NULL) {
    vr_log_close (log);
    return -ENOMEM;
  }
  *ret = log;
  return 0;
}

/* The positions as the superblock has them. */
static void
adopt_super (struct vr_log *log)
{
  const struct vr_super *s = &log->super;

  log->segment_size = s->segment_size;
  log->segment_count = s->segment_count;
  log->applied = (struct vr_mark){ s->applied_lsn, s->applied_chain };
  log->applied_epoch = s->applied_epoch;
  log->tail = log->applied;
  log->open_epoch = s->committed_epoch;
  log->sealed_epoch = s->committed_epoch;
  log->sealed_lsn = s->committed_lsn;
  log->recorded = s->committed_lsn;
}

static int
check_file_size (struct vr_log *log, struct vr_log_problem *problem)
{
  uint64_t size,
      need = VR_DATA_START + log->segment_size * log->segment_count;
  int err = log->io->ops->size (log->file, &size);

  if (err == 0 && size < need)
    err = problem_at (problem, size, -EUCLEAN,
                      "file ends at %llu, its segments need %llu",
                      (unsigned long long) size, (unsigned long long) need);
  return err;
}

/* What a killed process wrote, the file's name too, is there but maybe only in
   memory. */
static int
sync_found (struct vr_log *log)
{
  char *dir = directory_of (log->path);
  int err = dir ? vr_sync (log->file) : -ENOMEM;

  if (err == 0)
    err = log->io->ops->sync_dir (log->io, dir);
  free (dir);
  return err;
}

int
vr_log_open (struct vr_io *io, const char *path,
             const struct vr_log_open_options *o, struct vr_log **ret,
             struct vr_log_problem *problem, struct vr_lock_owner *owner)
{
  int flags = (o->read_only ? VR_OPEN_READ_ONLY : 0)
              | (o->direct ? VR_OPEN_DIRECT : 0);
  struct vr_log *log;
  bool erase = false;
  int err;

  *problem = (struct vr_log_problem){ 0 };
  *owner = (struct vr_lock_owner){ 0 };
  err = alloc_log (io, path, o, &log);
  if (err < 0)
    return err;
  err = io->ops->open (io, path, flags, &log->file);
  if (err == 0 && !o->read_only && !o->no_lock)
    err = io->ops->lock (log->file, owner);
  if (err == 0)
    err = read_super (log->file, &log->super, problem);
  if (err == 0) {
    adopt_super (log);
    err = check_file_size (log, problem);
  }
  if (err == 0)
    err = recover (log, problem, &erase);
  if (err == 0) {
    log->written = log->durable = log->head;
    err = load_tip (log);
  }
  if (err == 0 && erase && !o->read_only)
    err = erase_at_head (log);
  if (err == 0 && !o->read_only)
    err = sync_found (log);
  if (err < 0) {
    vr_log_close (log);
    return err;
  }
  *ret = log;
  return 0;
}

void
vr_log_close (struct vr_log *log)
{
  if (log == NULL)
    return;
  for (size_t i = 0; log->cache && i < log->cache_slots; i++)
    if (log->cache[i]) {
      free (log->cache[i]->data);
      free (log->cache[i]);
    }
  while (log->spares > 0) {
    struct vr_segbuf *s = log->spare[--log->spares];

    free (s->data);
    free (s);
  }
  vr_close (log->file);
  pthread_cond_destroy (&log->changed);
  pthread_mutex_destroy (&log->mutex);
  free (log->seals);
  free (log->cache);
  free (log->path);
  free (log);
}
