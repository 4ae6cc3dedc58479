/* SPDX-License-Identifier: BSD-3-Clause */
/* The tracker of track.h with userfaultfd.
 *
 * With WP_ASYNC the kernel resolves a write fault on a protected page by
 * itself: it takes the protection away, and that is the mark of a written
 * page.  Nobody has to answer, so if we die nothing waits for us.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "memsync/delta.h" /* VR_PAGE_SIZE */
#include "memsync/track.h"

#define REGIONS 1024 /* per scan */

/* Linux 6.7 (include/uapi/linux/fs.h and userfaultfd.h); Debian 12's headers
   are older. */
#define FEATURE_WP_HUGETLBFS_SHMEM (UINT64_C (1) << 12)
#define FEATURE_WP_UNPOPULATED (UINT64_C (1) << 13)
#define FEATURE_WP_ASYNC (UINT64_C (1) << 15)
#define FEATURES                                                              \
  (FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC     \
   | UFFD_FEATURE_PAGEFAULT_FLAG_WP)

struct scan_region {
  uint64_t start, end;
  uint64_t categories;
};

struct scan {
  uint64_t size; /* of this structure */
  uint64_t flags;
  uint64_t start, end;
  uint64_t walk_end; /* out: how far the scan got */
  uint64_t vec, vec_len;
  uint64_t max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask;
  uint64_t return_mask;
};
_Static_assert (sizeof (struct scan) == 96, "struct pm_scan_arg");

#define SCAN _IOWR ('f', 16, struct scan)
#define SCAN_PROTECT 1     /* write-protect what matches */
#define SCAN_CHECK_ASYNC 2 /* EPERM where WP_ASYNC is not at work */
#define IS_WRITTEN 2

struct tracker {
  struct vr_tracker base;
  int uffd;
  int pagemap;
  bool protect_runs;
  struct vr_ram ram;
  struct scan_region regions[REGIONS];
};

/* ---- Begin -------------------------------------------------------------- */

static int
negotiate (struct tracker *t, struct vr_problem *problem)
{
  struct uffdio_api api = { .api = UFFD_API, .features = FEATURES };
  int err;

  if (ioctl (t->uffd, UFFDIO_API, &api) == 0)
    return 0;
  err = errno == EINVAL ? -EOPNOTSUPP : -errno;
  return vr_problem (problem, err,
                     "this kernel's userfaultfd has no asynchronous "
                     "write-protection (Linux 6.7 has)");
}

static int
register_failed (const struct vr_ram_block *b, struct vr_problem *problem)
{
  const int err = -errno;

  if (err == -EBUSY)
    return vr_problem (problem, err,
                       "RAM block %s is tracked already, by another memsync "
                       "or a postcopy migration", b->name);
  if (err == -EINVAL || err == -EPERM)
    return vr_problem (problem, -EINVAL,
                       "RAM block %s cannot be tracked: its memory is neither "
                       "anonymous nor on tmpfs or hugetlbfs", b->name);
  return vr_problem (problem, err, "RAM block %s: registering it: %s", b->name,
                     strerror (-err));
}

static int
protect_block (struct tracker *t, const struct vr_ram_block *b,
               struct vr_problem *problem)
{
  struct uffdio_register r = { .range = { b->address, b->size },
                               .mode = UFFDIO_REGISTER_MODE_WP };
  struct uffdio_writeprotect w = { .range = { b->address, b->size },
                                   .mode = UFFDIO_WRITEPROTECT_MODE_WP };
  int err;

  if (ioctl (t->uffd, UFFDIO_REGISTER, &r) == -1)
    return register_failed (b, problem);
  while (ioctl (t->uffd, UFFDIO_WRITEPROTECT, &w) == -1) {
    err = -errno;
    if (err != -EAGAIN) /* its mappings are changing: again */
      return vr_problem (problem, err, "RAM block %s: protecting it: %s",
                         b->name, strerror (-err));
  }
  return 0;
}

static int
begin (struct vr_tracker *base, struct vr_problem *problem)
{
  struct tracker *t = (struct tracker *) base;
  int err = negotiate (t, problem);

  for (unsigned i = 0; i < t->ram.count && err == 0; i++)
    if (t->ram.blocks[i].address != 0)
      err = protect_block (t, &t->ram.blocks[i], problem);
  if (err < 0) {
    /* Takes back all that was registered. */
    close (t->uffd);
    t->uffd = -1;
  }
  return err;
}

/* ---- Collect ------------------------------------------------------------ */

/* One scan from *start on, which moves to where it ended.  Returns the number
   of regions found, or a negative errno. */
static int
scan (const struct tracker *t, uint64_t *start, uint64_t end, uint64_t flags,
      struct scan_region *regions, unsigned room)
{
  struct scan s = {
    .size = sizeof s, .flags = flags | SCAN_CHECK_ASYNC, .start = *start,
    .end = end, .vec = (uintptr_t) regions, .vec_len = room,
    .category_mask = IS_WRITTEN, .return_mask = IS_WRITTEN,
  };
  const int n = ioctl (t->pagemap, SCAN, &s);

  if (n == -1)
    return errno == EPERM ? -ESTALE : -errno;
  if (s.walk_end <= *start || s.walk_end > end || (unsigned) n > room)
    return -EIO; /* it would never end */
  *start = s.walk_end;
  return n;
}

/* Protect what is written in a run that was found.  A page of it that was
   written since is reported now and copied later, so nothing is lost. */
static int
protect_run (const struct tracker *t, const struct scan_region *run)
{
  struct scan_region ignored[16];
  uint64_t at = run->start;
  int n = 0;

  while (at < run->end && n >= 0)
    n = scan (t, &at, run->end, SCAN_PROTECT, ignored, 16);
  return n < 0 ? n : 0;
}

static int
take_region (const struct tracker *t, uint32_t block,
             const struct scan_region *r, struct vr_dirty *ret)
{
  const uint64_t base = t->ram.blocks[block].address;
  int err = vr_dirty_add (ret, block, (r->start - base) / VR_PAGE_SIZE,
                          (r->end - r->start) / VR_PAGE_SIZE);

  return err == 0 && t->protect_runs ? protect_run (t, r) : err;
}

static int
collect_block (struct tracker *t, uint32_t block, struct vr_dirty *ret)
{
  const struct vr_ram_block *b = &t->ram.blocks[block];
  const uint64_t end = b->address + b->size;
  uint64_t at = b->address;
  int err = 0;

  while (at < end && err == 0) {
    const int n = scan (t, &at, end, t->protect_runs ? 0 : SCAN_PROTECT,
                        t->regions, REGIONS);

    if (n < 0)
      return n;
    for (int i = 0; i < n && err == 0; i++)
      err = take_region (t, block, &t->regions[i], ret);
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
  return err;
}

/* ---- End ---------------------------------------------------------------- */

static void
end (struct vr_tracker *base)
{
  struct tracker *t = (struct tracker *) base;

  /* Closing it unregisters everything and takes the protection away. */
  if (t->uffd != -1)
    close (t->uffd);
  if (t->pagemap != -1)
    close (t->pagemap);
  vr_ram_free (&t->ram);
  free (t);
}

static const struct vr_tracker_ops ops = {
  .name = "uffd",
  .begin = begin,
  .collect = collect,
  .end = end,
};

int
vr_tracker_uffd (pid_t pid, int uffd, const struct vr_ram *ram,
                 bool protect_runs, struct vr_tracker **ret,
                 struct vr_problem *problem)
{
  struct tracker *t = calloc (1, sizeof *t);
  int err;

  if (!t) {
    close (uffd);
    return vr_problem (problem, -ENOMEM, "out of memory");
  }
  t->base.ops = &ops;
  t->uffd = uffd;
  t->pagemap = -1;
  t->protect_runs = protect_runs;
  err = vr_ram_copy (ram, &t->ram);
  if (err < 0)
    vr_problem (problem, err, "out of memory");
  else
    err = vr_open_proc (pid, "pagemap", O_RDONLY, &t->pagemap, problem);
  if (err < 0) {
    end (&t->base);
    return err;
  }
  *ret = &t->base;
  return 0;
}
