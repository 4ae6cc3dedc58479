/* SPDX-License-Identifier: BSD-3-Clause */
/* The tracker of track.h with soft-dirty bits, see the kernel's
 * Documentation/admin-guide/mm/soft-dirty.rst.
 *
 * Writing 4 to clear_refs clears the bits of all of the process, and
 * write-protects its pages; a write fault sets a page's bit.  A mapping that
 * is newer than that counts as written as a whole.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memsync/delta.h" /* VR_PAGE_SIZE */
#include "memsync/track.h"

#define CHUNK 8192 /* pages looked at at once */

/* Documentation/admin-guide/mm/pagemap.rst */
#define SOFT_DIRTY (UINT64_C (1) << 55)
#define SWAPPED (UINT64_C (1) << 62)
#define PRESENT (UINT64_C (1) << 63)

struct tracker {
  struct vr_tracker base;
  int pagemap;
  int clear_refs;
  struct vr_ram ram;
  uint64_t chunk[CHUNK];
};

/* ---- Is it there? ------------------------------------------------------- */

/* The bit of a page of our own that was just written. */
static int
read_own_bit (const void *page, bool *ret)
{
  const off_t at = (off_t) ((uintptr_t) page / VR_PAGE_SIZE * 8);
  uint64_t entry;
  ssize_t n;
  int fd, err = vr_open_proc (getpid (), "pagemap", O_RDONLY, &fd, NULL);

  if (err < 0)
    return err;
  n = pread (fd, &entry, sizeof entry, at);
  err = n == -1 ? -errno : n == sizeof entry ? 0 : -EIO;
  close (fd);
  *ret = err == 0 && (entry & SOFT_DIRTY);
  return err;
}

/* A kernel without soft-dirty bits takes the 4 and does nothing, so look. */
static int
probe (struct vr_problem *problem)
{
  volatile char *page = mmap (NULL, VR_PAGE_SIZE, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  bool is_set = false;
  int err;

  if (page == MAP_FAILED)
    return vr_problem (problem, -ENOMEM, "out of memory");
  *page = 1;
  err = read_own_bit ((const void *) (uintptr_t) page, &is_set);
  munmap ((void *) (uintptr_t) page, VR_PAGE_SIZE);
  if (err < 0)
    return vr_problem (problem, err, "reading our own pagemap: %s",
                       strerror (-err));
  if (!is_set)
    return vr_problem (problem, -EOPNOTSUPP,
                       "this kernel has no soft-dirty bits "
                       "(CONFIG_MEM_SOFT_DIRTY)");
  return 0;
}

/* ---- Track -------------------------------------------------------------- */

static int
clear (const struct tracker *t)
{
  return pwrite (t->clear_refs, "4", 1, 0) == 1 ? 0 : -errno;
}

static int
begin (struct vr_tracker *base, struct vr_problem *problem)
{
  struct tracker *t = (struct tracker *) base;
  int err = probe (problem);

  if (err < 0)
    return err;
  err = clear (t);
  if (err < 0)
    return vr_problem (problem, err, "clearing soft-dirty bits: %s",
                       strerror (-err));
  return 0;
}

static bool
is_written (const struct vr_ram_block *b, uint64_t entry)
{
  return (entry & SOFT_DIRTY)
         || (b->shared && !(entry & (PRESENT | SWAPPED)));
}

static int
collect_chunk (struct tracker *t, uint32_t block, uint64_t first,
               unsigned count, struct vr_dirty *ret)
{
  const struct vr_ram_block *b = &t->ram.blocks[block];
  const uint64_t entry = b->address / VR_PAGE_SIZE + first;
  const ssize_t n = pread (t->pagemap, t->chunk, count * 8, (off_t) entry * 8);
  int err = 0;

  if (n == -1)
    return -errno;
  if (n != (ssize_t) (count * 8))
    return -ESTALE;
  for (unsigned i = 0; i < count && err == 0; i++)
    if (is_written (b, t->chunk[i]))
      err = vr_dirty_add (ret, block, first + i, 1);
  return err;
}

static int
collect_block (struct tracker *t, uint32_t block, struct vr_dirty *ret)
{
  const uint64_t pages = t->ram.blocks[block].size / VR_PAGE_SIZE;
  int err = 0;

  for (uint64_t at = 0; at < pages && err == 0; at += CHUNK) {
    const uint64_t left = pages - at;

    err = collect_chunk (t, block, at, left < CHUNK ? (unsigned) left : CHUNK,
                         ret);
  }
  return err;
}

static int
collect (struct vr_tracker *base, struct vr_dirty *ret)
{
  struct tracker *t = (struct tracker *) base;
  int err = 0;

  vr_dirty_clear (ret);
  for (uint32_t i = 0; i < t->ram.count && err == 0; i++)
    if (t->ram.blocks[i].address != 0)
      err = collect_block (t, i, ret);
  return err == 0 ? clear (t) : err;
}

/* The pages are left write-protected until each is written for the next time;
   nothing else can be told from before. */
static void
end (struct vr_tracker *base)
{
  struct tracker *t = (struct tracker *) base;

  if (t->pagemap != -1)
    close (t->pagemap);
  if (t->clear_refs != -1)
    close (t->clear_refs);
  vr_ram_free (&t->ram);
  free (t);
}

static const struct vr_tracker_ops ops = {
  .name = "soft-dirty",
  .needs_stop = true,
  .begin = begin,
  .collect = collect,
  .end = end,
};

int
vr_tracker_soft_dirty (pid_t pid, const struct vr_ram *ram,
                       struct vr_tracker **ret, struct vr_problem *problem)
{
  struct tracker *t = calloc (1, sizeof *t);
  int err;

  if (!t)
    return vr_problem (problem, -ENOMEM, "out of memory");
  t->base.ops = &ops;
  t->pagemap = t->clear_refs = -1;
  err = vr_ram_copy (ram, &t->ram);
  if (err < 0)
    vr_problem (problem, err, "out of memory");
  if (err == 0)
    err = vr_open_proc (pid, "pagemap", O_RDONLY, &t->pagemap, problem);
  if (err == 0)
    err = vr_open_proc (pid, "clear_refs", O_WRONLY, &t->clear_refs, problem);
  if (err < 0) {
    end (&t->base);
    return err;
  }
  *ret = &t->base;
  return 0;
}
