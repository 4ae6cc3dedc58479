/* SPDX-License-Identifier: BSD-3-Clause */
/* What both trackers need. */
#include "memsync/track.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void
vr_dirty_clear (struct vr_dirty *d)
{
  d->count = 0;
  d->pages = 0;
}

void
vr_dirty_free (struct vr_dirty *d)
{
  free (d->runs);
  memset (d, 0, sizeof *d);
}

static int
make_room (struct vr_dirty *d)
{
  const size_t capacity = d->capacity ? d->capacity * 2 : 256;
  void *p;

  if (d->count < d->capacity)
    return 0;
  p = realloc (d->runs, capacity * sizeof *d->runs);
  if (!p)
    return -ENOMEM;
  d->runs = p;
  d->capacity = capacity;
  return 0;
}

int
vr_dirty_add (struct vr_dirty *d, uint32_t block, uint64_t page,
              uint64_t pages)
{
  struct vr_run *last = d->count ? &d->runs[d->count - 1] : NULL;
  int err;

  if (last && last->block == block) {
    assert (page >= last->page + last->pages);
    if (page == last->page + last->pages) {
      last->pages += pages;
      d->pages += pages;
      return 0;
    }
  }
  err = make_room (d);
  if (err < 0)
    return err;
  d->runs[d->count++] = (struct vr_run) { block, page, pages };
  d->pages += pages;
  return 0;
}

int
vr_ram_copy (const struct vr_ram *ram, struct vr_ram *ret)
{
  ret->count = ram->count;
  ret->blocks = calloc (ram->count ? ram->count : 1, sizeof *ret->blocks);
  if (!ret->blocks)
    return -ENOMEM;
  if (ram->count > 0)
    memcpy (ret->blocks, ram->blocks, ram->count * sizeof *ret->blocks);
  return 0;
}

int
vr_open_proc (pid_t pid, const char *name, int flags, int *ret,
              struct vr_problem *problem)
{
  char path[64];
  int err;

  snprintf (path, sizeof path, "/proc/%d/%s", (int) pid, name);
  *ret = open (path, flags | O_CLOEXEC);
  if (*ret != -1)
    return 0;
  err = -errno;
  return vr_problem (problem, err, "%s: %s", path, strerror (-err));
}
