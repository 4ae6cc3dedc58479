/* SPDX-License-Identifier: BSD-3-Clause */
/* The simulated environment: files in memory that a crash treats as badly as
 * the durability model in io.h allows.
 *
 * A file is a table of 4 KiB pages.  A page holds its bytes as of `now` (what
 * reads see: the page cache) and, while the two differ, as of `then` (what
 * is on the platter).  Each write since the last sync also waits in a list
 * with a copy of its bytes.
 *
 *   write    changes now, and appends to the list
 *   sync     replays the list onto then
 *   crash    replays the list onto then, but each sector of each write meets
 *            its fate first: kept, dropped or garbled; then now := then
 *   failed   throws the list away.  now keeps the bytes or loses them, page by
 *   sync     page as if evicted; then never gets them, and a later sync says 0
 *
 * Replay is in order, so one sector never goes back to an older write of two
 * that were kept; across sectors any order of reaching the platter shows.
 *
 * Names work the same way: `live` is the directory tree programs see,
 * `durable` the one on the platter, and operations wait in a list until
 * sync_dir or a crash replays them.
 *
 * Everything random comes from one splitmix64 (Steele, Lea, Flood, "Fast
 * splittable pseudorandom number generators", OOPSLA 2014; constants as in
 * Vigna's public domain splitmix64.c), so one thread with one seed gets the
 * same bytes each time.  One mutex covers it all.
 *
 * A simulation that runs out of memory has nothing to say: it aborts.
 */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "journal/io.h"

#define PAGE 4096u
#define SECTOR 512u
#define LEAF_PAGES 512u
#define LEAF_BYTES ((uint64_t)LEAF_PAGES * PAGE)
#define MAX_SIZE (UINT64_C (1) << 44) /* 16 TiB, as ext4 */
#define FIRST_NS UINT64_C (1000000000)
#define FIRST_REALTIME_NS UINT64_C (1700000000000000000) /* November 2023 */

struct page {
  uint8_t now[PAGE];
  uint8_t *then; /* NULL: the same as now */
  bool hole;     /* now was deallocated (reads as zeros) */
};

struct leaf {
  struct page *page[LEAF_PAGES]; /* NULL: zeros, now and then */
};

enum pending_kind { PENDING_WRITE, PENDING_ZERO, PENDING_RESIZE };

/* One change of a file since its last sync. */
struct pending {
  struct pending *next;
  enum pending_kind kind;
  uint64_t offset; /* RESIZE: 0 */
  uint64_t end;    /* RESIZE: the new size */
  uint8_t data[];  /* WRITE: end - offset bytes */
};

struct inode {
  struct inode *next;
  bool is_dir;
  bool marked;    /* scratch of sweep */
  unsigned opens; /* open files of a living process */
  uint64_t size, durable_size;
  struct leaf **leaf; /* NULL elements: zeros */
  size_t leaf_count;
  struct pending *first, **last;
  const struct sim_file *locker;
};

struct name {
  char *path;
  struct inode *inode;
};

struct tree {
  struct name *name;
  size_t count, room;
};

/* LINK: the inode is known by `path` and by no other name (create, mkdir,
   rename).  UNLINK: path is gone, if it still means that inode. */
struct name_op {
  struct name_op *next;
  bool unlink;
  char *path;
  struct inode *inode;
};

struct sim_file {
  struct vr_file file;
  struct sim_file *next;
  struct inode *inode; /* NULL: the process that opened it is dead */
  bool read_only, direct;
};

struct sim {
  struct vr_io io;
  pthread_mutex_t mutex;
  uint64_t rng, clock_ns;
  struct inode *inodes;
  struct tree live, durable;
  struct name_op *first_op, **last_op;
  struct sim_file *files;
  uint64_t space; /* 0: no limit */
  uint64_t steps, die_at;
  bool dead;
  struct {
    unsigned mask;
    uint64_t n;
    int err;
    bool sticky;
  } fail;
};

static inline struct sim *
sim_of (struct vr_io *io)
{
  return (struct sim *)io;
}

static struct sim *
lock_sim (struct vr_io *io)
{
  pthread_mutex_lock (&sim_of (io)->mutex);
  return sim_of (io);
}

/* Returns r, to let an operation end in one line. */
static int
unlock_sim (struct sim *s, int r)
{
  pthread_mutex_unlock (&s->mutex);
  return r;
}

static void *
must (void *p)
{
  if (p == NULL)
    abort ();
  return p;
}

static inline uint64_t
min_u64 (uint64_t a, uint64_t b)
{
  return a < b ? a : b;
}

static inline uint64_t
max_u64 (uint64_t a, uint64_t b)
{
  return a > b ? a : b;
}

/* ---- Randomness --------------------------------------------------------- */

static uint64_t
random_u64 (struct sim *s)
{
  uint64_t z = s->rng += UINT64_C (0x9e3779b97f4a7c15);

  z = (z ^ (z >> 30)) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C (0x94d049bb133111eb);
  return z ^ (z >> 31);
}

static void
random_bytes (struct sim *s, void *buf, size_t n)
{
  uint8_t *p = buf;

  for (size_t i = 0; i < n; i += 8) {
    const uint64_t x = random_u64 (s);

    memcpy (p + i, &x, n - i < 8 ? n - i : 8);
  }
}

enum fate { KEEP, DROP, GARBLE };

static enum fate
roll_fate (struct sim *s, const struct vr_sim_crash *crash)
{
  const unsigned roll = (unsigned)(random_u64 (s) >> 56);

  if (roll < crash->drop)
    return DROP;
  return roll < crash->drop + crash->garbage ? GARBLE : KEEP;
}

/* ---- Pages -------------------------------------------------------------- */

/* Call fn for each page there is with a byte in [start, end): from and to
   are the part of the range inside the page. */
typedef void page_fn (struct page *page, size_t from, size_t to, void *arg);

static void
for_each_page (struct inode *ino, uint64_t start, uint64_t end, page_fn *fn,
               void *arg)
{
  end = min_u64 (end, ino->leaf_count * LEAF_BYTES);
  while (start < end) {
    struct leaf *leaf = ino->leaf[start / LEAF_BYTES];
    struct page *page;
    const uint64_t from = start % PAGE;
    const uint64_t to = min_u64 (PAGE, from + (end - start));

    if (leaf == NULL) {
      start = (start / LEAF_BYTES + 1) * LEAF_BYTES;
      continue;
    }
    page = leaf->page[start / PAGE % LEAF_PAGES];
    if (page != NULL)
      fn (page, (size_t)from, (size_t)to, arg);
    start += to - from;
  }
}

static struct page *
find_page (const struct inode *ino, uint64_t offset)
{
  const uint64_t i = offset / LEAF_BYTES;

  if (i >= ino->leaf_count || ino->leaf[i] == NULL)
    return NULL;
  return ino->leaf[i]->page[offset / PAGE % LEAF_PAGES];
}

static struct page *
make_page (struct inode *ino, uint64_t offset)
{
  const size_t i = (size_t)(offset / LEAF_BYTES);
  struct page **slot;

  if (i >= ino->leaf_count) {
    const size_t count = 2 * i + 1;

    ino->leaf = must (realloc (ino->leaf, count * sizeof ino->leaf[0]));
    memset (ino->leaf + ino->leaf_count, 0,
            (count - ino->leaf_count) * sizeof ino->leaf[0]);
    ino->leaf_count = count;
  }
  if (ino->leaf[i] == NULL)
    ino->leaf[i] = must (calloc (1, sizeof *ino->leaf[i]));
  slot = &ino->leaf[i]->page[offset / PAGE % LEAF_PAGES];
  if (*slot == NULL)
    *slot = must (calloc (1, sizeof **slot));
  return *slot;
}

/* Call before now changes. */
static void
keep_then (struct page *page)
{
  if (page->then != NULL)
    return;
  page->then = must (malloc (PAGE));
  memcpy (page->then, page->now, PAGE);
}

static void
zero_now (struct page *page, size_t from, size_t to, void *arg)
{
  const bool *may_deallocate = arg;

  keep_then (page);
  memset (page->now + from, 0, to - from);
  if (*may_deallocate && to - from == PAGE)
    page->hole = true;
}

static void
zero_then (struct page *page, size_t from, size_t to, void *arg)
{
  (void)arg;
  if (page->then != NULL)
    memset (page->then + from, 0, to - from);
}

static void
revert_now (struct page *page, size_t from, size_t to, void *arg)
{
  (void)from, (void)to, (void)arg;
  if (page->then != NULL) {
    memcpy (page->now, page->then, PAGE);
    page->hole = false;
  }
}

static void
evict_maybe (struct page *page, size_t from, size_t to, void *arg)
{
  if (random_u64 (arg) & 1)
    revert_now (page, from, to, NULL);
}

static void
settle_page (struct page *page, size_t from, size_t to, void *arg)
{
  (void)from, (void)to, (void)arg;
  if (page->then != NULL && memcmp (page->then, page->now, PAGE) == 0) {
    free (page->then);
    page->then = NULL;
  }
}

/* ---- Changes of a file -------------------------------------------------- */

static struct pending *
pending_new (enum pending_kind kind, uint64_t offset, uint64_t end)
{
  const size_t n = kind == PENDING_WRITE ? (size_t)(end - offset) : 0;
  struct pending *p = must (malloc (sizeof *p + n));

  p->next = NULL;
  p->kind = kind;
  p->offset = offset;
  p->end = end;
  return p;
}

static void
pending_append (struct inode *ino, struct pending *p)
{
  *ino->last = p;
  ino->last = &p->next;
}

static void
pending_clear (struct inode *ino)
{
  struct pending *next;

  for (struct pending *p = ino->first; p != NULL; p = next) {
    next = p->next;
    free (p);
  }
  ino->first = NULL;
  ino->last = &ino->first;
}

/* Change now, and leave the change pending. */
static void
inode_write (struct inode *ino, struct pending *p)
{
  uint64_t pos = p->offset;

  while (pos < p->end) {
    struct page *page = make_page (ino, pos);
    const size_t n = (size_t)min_u64 (PAGE - pos % PAGE, p->end - pos);

    keep_then (page);
    memcpy (page->now + pos % PAGE, p->data + (pos - p->offset), n);
    page->hole = false;
    pos += n;
  }
  ino->size = max_u64 (ino->size, p->end);
  pending_append (ino, p);
}

static void
inode_zero (struct inode *ino, uint64_t offset, uint64_t end,
            bool may_deallocate)
{
  for_each_page (ino, offset, end, zero_now, &may_deallocate);
  ino->size = max_u64 (ino->size, end);
  pending_append (ino, pending_new (PENDING_ZERO, offset, end));
}

static void
inode_resize (struct inode *ino, uint64_t size)
{
  bool deallocate = true;

  for_each_page (ino, size, UINT64_MAX, zero_now, &deallocate);
  ino->size = size;
  pending_append (ino, pending_new (PENDING_RESIZE, 0, size));
}

/* ---- Replay ------------------------------------------------------------- */

/* Let [pos, pos+n), inside one sector, reach the platter or not.  Garbage
   stays within the bytes written. */
static void
replay_piece (struct sim *s, struct inode *ino, const struct pending *p,
              uint64_t pos, size_t n, enum fate fate)
{
  struct page *page = find_page (ino, pos);
  uint8_t *then;

  if (page == NULL || page->then == NULL || fate == DROP)
    return; /* no page: zeros over zeros */
  then = page->then + pos % PAGE;
  if (fate == GARBLE)
    random_bytes (s, then, n);
  else if (p->kind == PENDING_WRITE)
    memcpy (then, p->data + (pos - p->offset), n);
  else
    memset (then, 0, n);
}

/* The next byte after pos that can need replay: zeroing over nothing, over
   however many gigabytes, does not. */
static uint64_t
skip_nothing (const struct inode *ino, uint64_t pos, uint64_t end)
{
  while (pos < end && find_page (ino, pos) == NULL) {
    const uint64_t i = pos / LEAF_BYTES;

    if (i >= ino->leaf_count)
      return end;
    pos =
      ino->leaf[i] == NULL ? (i + 1) * LEAF_BYTES : (pos / PAGE + 1) * PAGE;
  }
  return min_u64 (pos, end);
}

static void
replay_bytes (struct sim *s, struct inode *ino, const struct pending *p,
              const struct vr_sim_crash *crash)
{
  enum fate fate = roll_fate (s, crash);
  uint64_t pos = skip_nothing (ino, p->offset, p->end);

  /* The size may get through without the bytes, and the other way round, on
     a device that tears. */
  if (fate != DROP)
    ino->durable_size = max_u64 (ino->durable_size, p->end);
  while (pos < p->end) {
    const uint64_t n = min_u64 (SECTOR - pos % SECTOR, p->end - pos);

    if (crash->torn)
      fate = roll_fate (s, crash);
    replay_piece (s, ino, p, pos, (size_t)n, fate);
    pos = skip_nothing (ino, pos + n, p->end);
  }
}

static void
replay (struct sim *s, struct inode *ino, const struct vr_sim_crash *crash)
{
  for (const struct pending *p = ino->first; p != NULL; p = p->next) {
    if (p->kind != PENDING_RESIZE)
      replay_bytes (s, ino, p, crash);
    else if (roll_fate (s, crash) != DROP) {
      for_each_page (ino, p->end, UINT64_MAX, zero_then, NULL);
      ino->durable_size = p->end;
    }
  }
}

/* After sync: drop second copies that no longer differ. */
static void
settle (struct inode *ino)
{
  for (const struct pending *p = ino->first; p != NULL; p = p->next)
    for_each_page (ino, p->kind == PENDING_RESIZE ? p->end : p->offset,
                   p->kind == PENDING_RESIZE ? UINT64_MAX : p->end,
                   settle_page, NULL);
}

static void
inode_sync (struct sim *s, struct inode *ino)
{
  static const struct vr_sim_crash keep_all;

  replay (s, ino, &keep_all);
  ino->durable_size = ino->size;
  settle (ino);
  pending_clear (ino);
}

static void
inode_sync_failed (struct sim *s, struct inode *ino)
{
  for (const struct pending *p = ino->first; p != NULL; p = p->next)
    if (p->kind != PENDING_RESIZE)
      for_each_page (ino, p->offset, p->end, evict_maybe, s);
  pending_clear (ino);
}

static void
inode_crash (struct sim *s, struct inode *ino,
             const struct vr_sim_crash *crash)
{
  replay (s, ino, crash);
  pending_clear (ino);
  for_each_page (ino, ino->durable_size, UINT64_MAX, zero_then, NULL);
  for_each_page (ino, 0, UINT64_MAX, revert_now, NULL);
  for_each_page (ino, 0, UINT64_MAX, settle_page, NULL);
  ino->size = ino->durable_size;
}

/* ---- Inodes and names --------------------------------------------------- */

static struct inode *
inode_new (struct sim *s, bool is_dir)
{
  struct inode *ino = must (calloc (1, sizeof *ino));

  ino->is_dir = is_dir;
  ino->last = &ino->first;
  ino->next = s->inodes;
  s->inodes = ino;
  return ino;
}

static void
free_page (struct page *page, size_t from, size_t to, void *arg)
{
  (void)from, (void)to, (void)arg;
  free (page->then);
  free (page);
}

static void
inode_free (struct inode *ino)
{
  pending_clear (ino);
  for_each_page (ino, 0, UINT64_MAX, free_page, NULL);
  for (size_t i = 0; i < ino->leaf_count; i++)
    free (ino->leaf[i]);
  free (ino->leaf);
  free (ino);
}

/* Free the inodes that no name, operation or open file leads to. */
static void
sweep (struct sim *s)
{
  struct inode **link = &s->inodes;

  for (size_t i = 0; i < s->live.count; i++)
    s->live.name[i].inode->marked = true;
  for (size_t i = 0; i < s->durable.count; i++)
    s->durable.name[i].inode->marked = true;
  for (struct name_op *op = s->first_op; op != NULL; op = op->next)
    op->inode->marked = true;

  while (*link != NULL) {
    struct inode *ino = *link;

    if (ino->marked || ino->opens > 0) {
      ino->marked = false;
      link = &ino->next;
    }
    else {
      *link = ino->next;
      inode_free (ino);
    }
  }
}

/* Write path without doubled or final slashes and leading "./" to buf. */
static int
normalise (const char *path, char buf[PATH_MAX])
{
  size_t n = 0;

  if (*path == '\0')
    return -ENOENT;
  while (path[0] == '.' && path[1] == '/')
    path += 1 + strspn (path + 1, "/");
  for (; *path != '\0'; path++) {
    if (*path == '/' && n > 0 && buf[n - 1] == '/')
      continue;
    if (n == PATH_MAX - 1)
      return -ENAMETOOLONG;
    buf[n++] = *path;
  }
  while (n > 1 && buf[n - 1] == '/')
    n--;
  if (n == 0)
    buf[n++] = '.';
  buf[n] = '\0';
  return 0;
}

static size_t
parent_length (const char *path)
{
  const char *slash = strrchr (path, '/');

  return slash == NULL ? 0 : slash == path ? 1 : (size_t)(slash - path);
}

/* Whether path is directly in dir; both normalised. */
static bool
is_in (const char *path, const char *dir)
{
  const size_t n = parent_length (path);

  return n == 0 ? strcmp (dir, ".") == 0
                : strncmp (path, dir, n) == 0 && dir[n] == '\0';
}

static struct name *
tree_find (const struct tree *t, const char *path)
{
  for (size_t i = 0; i < t->count; i++)
    if (strcmp (t->name[i].path, path) == 0)
      return &t->name[i];
  return NULL;
}

static void
tree_remove (struct tree *t, struct name *name)
{
  free (name->path);
  *name = t->name[--t->count];
}

static void
tree_clear (struct tree *t)
{
  while (t->count > 0)
    free (t->name[--t->count].path);
}

static void
tree_add (struct tree *t, const char *path, struct inode *ino)
{
  if (t->count == t->room) {
    t->room = t->room * 2 + 8;
    t->name = must (realloc (t->name, t->room * sizeof t->name[0]));
  }
  t->name[t->count++] =
    (struct name){.path = must (strdup (path)), .inode = ino};
}

static void
tree_apply (struct tree *t, const struct name_op *op)
{
  struct name *name;

  if (op->unlink) {
    name = tree_find (t, op->path);
    if (name != NULL && name->inode == op->inode)
      tree_remove (t, name);
    return;
  }
  for (size_t i = 0; i < t->count; i++)
    if (t->name[i].inode == op->inode)
      tree_remove (t, &t->name[i--]);
  name = tree_find (t, op->path);
  if (name != NULL)
    name->inode = op->inode;
  else
    tree_add (t, op->path, op->inode);
}

static bool
is_root (const char *path)
{
  return strcmp (path, "/") == 0 || strcmp (path, ".") == 0;
}

static bool
is_dir (const struct tree *t, const char *path)
{
  const struct name *name = tree_find (t, path);

  return is_root (path) || (name != NULL && name->inode->is_dir);
}

static bool
has_parent (const struct tree *t, const char *path)
{
  char dir[PATH_MAX];
  const size_t n = parent_length (path);

  if (n == 0)
    return true;
  memcpy (dir, path, n);
  dir[n] = '\0';
  return is_dir (t, dir);
}

/* Change the live tree, and leave the change pending. */
static void
change_name (struct sim *s, bool unlink, const char *path, struct inode *ino)
{
  struct name_op *op = must (calloc (1, sizeof *op));

  op->unlink = unlink;
  op->path = must (strdup (path));
  op->inode = ino;
  *s->last_op = op;
  s->last_op = &op->next;
  tree_apply (&s->live, op);
}

/* Take the operation out of the list; it becomes durable if apply. */
static void
finish_op (struct sim *s, struct name_op **link, bool apply)
{
  struct name_op *op = *link;

  if (apply)
    tree_apply (&s->durable, op);
  *link = op->next;
  if (s->last_op == &op->next)
    s->last_op = link;
  free (op->path);
  free (op);
}

/* Names whose directory did not survive are gone too. */
static void
drop_orphans (struct tree *t)
{
  bool again;

  do {
    again = false;
    for (size_t i = 0; i < t->count; i++)
      if (!has_parent (t, t->name[i].path)) {
        tree_remove (t, &t->name[i--]);
        again = true;
      }
  } while (again);
}

static void
names_crash (struct sim *s, const struct vr_sim_crash *crash)
{
  while (s->first_op != NULL)
    finish_op (s, &s->first_op, roll_fate (s, crash) != DROP);
  drop_orphans (&s->durable);
  tree_clear (&s->live);
  for (size_t i = 0; i < s->durable.count; i++)
    tree_add (&s->live, s->durable.name[i].path, s->durable.name[i].inode);
}

/* ---- Entry to every operation ------------------------------------------- */

/* Whether the fault set by vr_io_sim_fail strikes this call. */
static int
injected (struct sim *s, unsigned kind)
{
  if (s->fail.n == 0 || !(s->fail.mask & kind))
    return 0;
  if (s->fail.n > 1) {
    s->fail.n--;
    return 0;
  }
  if (!s->fail.sticky)
    s->fail.n = 0;
  return s->fail.err;
}

/* Die or fail if that is due.  kind 0 never fails; f may be NULL. */
static int
enter (struct sim *s, const struct sim_file *f, unsigned kind)
{
  if (s->dead || (f != NULL && f->inode == NULL))
    return -ESHUTDOWN;
  return injected (s, kind);
}

/* The same for what changes state, which counts as a step. */
static int
enter_step (struct sim *s, const struct sim_file *f, unsigned kind)
{
  const int r = enter (s, f, 0);

  if (r < 0)
    return r;
  if (s->die_at != 0 && s->steps + 1 >= s->die_at) {
    s->dead = true;
    return -ESHUTDOWN;
  }
  s->steps++;
  return injected (s, kind);
}

/* What the kernel refuses with O_DIRECT. */
static bool
misaligned (const struct sim_file *f, const void *buf, uint64_t offset,
            uint64_t n)
{
  return f->direct &&
         ((uintptr_t)buf % PAGE != 0 || offset % PAGE != 0 || n % PAGE != 0);
}

/* Whether [offset, end) may be written, room included. */
static int
check_write (const struct sim *s, const struct sim_file *f, uint64_t offset,
             uint64_t end)
{
  uint64_t used = 0;

  if (f->read_only)
    return -EBADF;
  if (end < offset || end > MAX_SIZE)
    return -EFBIG;
  if (s->space == 0 || end <= f->inode->size)
    return 0;
  for (const struct inode *ino = s->inodes; ino != NULL; ino = ino->next) {
    /* A deleted file takes space until its last close. */
    bool counts = ino->opens > 0;

    for (size_t i = 0; i < s->live.count && !counts; i++)
      counts = s->live.name[i].inode == ino;
    used += counts ? ino->size : 0;
  }
  return used + (end - f->inode->size) > s->space ? -ENOSPC : 0;
}

/* ---- Operations on files ------------------------------------------------ */

static int
lookup_or_create (struct sim *s, const char *path, int flags,
                  struct inode **ret_inode)
{
  const struct name *name = tree_find (&s->live, path);
  const bool exists = name != NULL || is_root (path);

  if (flags & VR_OPEN_CREATE) {
    if (exists)
      return -EEXIST;
    if (!has_parent (&s->live, path))
      return -ENOENT;
    *ret_inode = inode_new (s, false);
    change_name (s, false, path, *ret_inode);
    return 0;
  }
  if (!exists)
    return -ENOENT;
  if (is_dir (&s->live, path))
    return -EISDIR;
  *ret_inode = name->inode;
  return 0;
}

static int
sim_open (struct vr_io *io, const char *path, int flags,
          struct vr_file **ret_file)
{
  struct sim *s = lock_sim (io);
  char normal[PATH_MAX];
  struct inode *ino = NULL;
  struct sim_file *f;
  int r = flags & VR_OPEN_CREATE ? enter_step (s, NULL, VR_SIM_OPEN)
                                 : enter (s, NULL, VR_SIM_OPEN);

  if (r == 0)
    r = normalise (path, normal);
  if (r == 0)
    r = lookup_or_create (s, normal, flags, &ino);
  if (r < 0)
    return unlock_sim (s, r);

  f = must (calloc (1, sizeof *f));
  f->file.io = io;
  f->inode = ino;
  f->read_only = flags & VR_OPEN_READ_ONLY;
  f->direct = flags & VR_OPEN_DIRECT;
  f->next = s->files;
  s->files = f;
  ino->opens++;
  *ret_file = &f->file;
  return unlock_sim (s, 0);
}

static void
sim_close (struct vr_file *file)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  struct sim_file **link = &s->files;

  while (*link != f)
    link = &(*link)->next;
  *link = f->next;
  if (f->inode != NULL) {
    if (f->inode->locker == f)
      f->inode->locker = NULL;
    f->inode->opens--;
    sweep (s);
  }
  free (f);
  unlock_sim (s, 0);
}

static int
sim_size (struct vr_file *file, uint64_t *ret_size)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  const int r = enter (s, f, VR_SIM_READ);

  if (r == 0)
    *ret_size = f->inode->size;
  return unlock_sim (s, r);
}

static int
sim_truncate (struct vr_file *file, uint64_t size)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  int r = enter_step (s, f, VR_SIM_NAME);

  if (r == 0)
    r = check_write (s, f, 0, size);
  if (r == 0 && size != f->inode->size)
    inode_resize (f->inode, size);
  return unlock_sim (s, r);
}

static int
sim_read (struct vr_file *file, void *buf, size_t n, uint64_t offset)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  uint8_t *p = buf;
  int r = enter (s, f, VR_SIM_READ);

  if (r == 0 && misaligned (f, buf, offset, n))
    r = -EINVAL;
  if (r == 0 && n > 0 &&
      (offset > f->inode->size || n > f->inode->size - offset))
    r = -ENODATA;

  while (r == 0 && n > 0) {
    const struct page *page = find_page (f->inode, offset);
    const size_t m = (size_t)min_u64 (n, PAGE - offset % PAGE);

    if (page != NULL)
      memcpy (p, page->now + offset % PAGE, m);
    else
      memset (p, 0, m);
    p += m;
    offset += m;
    n -= m;
  }
  return unlock_sim (s, r);
}

/* Gather w into a pending change; NULL and *ret_r if it may not be done. */
static struct pending *
gather (const struct sim *s, const struct sim_file *f,
        const struct vr_io_write *w, int *ret_r)
{
  struct pending *p;
  uint64_t length = 0;
  size_t done = 0;

  *ret_r = 0;
  for (int i = 0; i < w->iov_count; i++) {
    const struct iovec *v = &w->iov[i];

    if (misaligned (f, v->iov_base, w->offset, v->iov_len))
      *ret_r = -EINVAL;
    length += v->iov_len;
  }
  if (*ret_r == 0)
    *ret_r = check_write (s, f, w->offset, w->offset + length);
  if (*ret_r < 0 || length == 0)
    return NULL;

  p = pending_new (PENDING_WRITE, w->offset, w->offset + length);
  for (int i = 0; i < w->iov_count; i++) {
    if (w->iov[i].iov_len > 0)
      memcpy (p->data + done, w->iov[i].iov_base, w->iov[i].iov_len);
    done += w->iov[i].iov_len;
  }
  return p;
}

/* An injected failure still lets something through: of each element, with
   an even chance, the bytes up to a random one. */
static void
write_part (struct sim *s, struct sim_file *f, const struct vr_io_write *w)
{
  struct pending *p;
  int r;

  if (random_u64 (s) & 1)
    return;
  p = gather (s, f, w, &r);
  if (p == NULL)
    return;
  p->end = p->offset + random_u64 (s) % (p->end - p->offset + 1);
  if (p->end > p->offset)
    inode_write (f->inode, p);
  else
    free (p);
}

static int
sim_write_batch (struct vr_file *file, const struct vr_io_write *w, size_t n)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  int r = enter_step (s, f, VR_SIM_WRITE);

  if (r < 0 && r != -ESHUTDOWN)
    for (size_t i = 0; i < n; i++)
      write_part (s, f, &w[i]);
  for (size_t i = 0; r == 0 && i < n; i++) {
    struct pending *p = gather (s, f, &w[i], &r);

    if (p != NULL)
      inode_write (f->inode, p);
  }
  return unlock_sim (s, r);
}

static int
sim_writev (struct vr_file *file, const struct iovec *iov, int iov_count,
            uint64_t offset)
{
  const struct vr_io_write w = {
    .iov = iov, .iov_count = iov_count, .offset = offset};

  return sim_write_batch (file, &w, 1);
}

static int
sim_zero (struct vr_file *file, uint64_t offset, uint64_t length,
          bool may_deallocate)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  int r = enter_step (s, f, VR_SIM_WRITE);

  if (r == 0 && misaligned (f, NULL, offset, length))
    r = -EINVAL;
  if (r == 0)
    r = check_write (s, f, offset, offset + length);
  if (r == 0 && length > 0)
    inode_zero (f->inode, offset, offset + length, may_deallocate);
  return unlock_sim (s, r);
}

static int
sim_sync (struct vr_file *file)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  const int r = enter_step (s, f, VR_SIM_SYNC);

  if (r == 0)
    inode_sync (s, f->inode);
  else if (r != -ESHUTDOWN)
    inode_sync_failed (s, f->inode);
  return unlock_sim (s, r);
}

static void
sim_start_writeback (struct vr_file *file, uint64_t offset, uint64_t length)
{
  (void)file, (void)offset, (void)length;
}

static int
sim_prefetch (struct vr_file *file, uint64_t offset, uint64_t length)
{
  struct sim *s = lock_sim (file->io);

  (void)offset, (void)length;
  return unlock_sim (s, enter (s, (struct sim_file *)file, VR_SIM_READ));
}

/* The first page boundary at or after pos, or pos itself, where data begins
   (or ends, if !want_data); never past the end of the file. */
static uint64_t
seek (const struct inode *ino, uint64_t pos, bool want_data)
{
  while (pos < ino->size) {
    const uint64_t i = pos / LEAF_BYTES;
    const struct page *page = find_page (ino, pos);
    const bool no_leaf = i >= ino->leaf_count || ino->leaf[i] == NULL;

    if ((page != NULL && !page->hole) == want_data)
      return pos;
    pos = no_leaf ? (i + 1) * LEAF_BYTES : (pos / PAGE + 1) * PAGE;
  }
  return ino->size;
}

static int
sim_next_data (struct vr_file *file, uint64_t offset, uint64_t *ret_start,
               uint64_t *ret_end)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  const int r = enter (s, f, VR_SIM_READ);

  if (r == 0) {
    *ret_start = seek (f->inode, offset, true);
    *ret_end = seek (f->inode, *ret_start, false);
  }
  return unlock_sim (s, r);
}

static int
sim_lock (struct vr_file *file, struct vr_lock_owner *ret_owner)
{
  struct sim_file *f = (struct sim_file *)file;
  struct sim *s = lock_sim (file->io);
  int r = enter (s, f, VR_SIM_OPEN);

  if (r == 0 && f->read_only)
    r = -EBADF;
  if (r == 0 && f->inode->locker != NULL && f->inode->locker != f) {
    ret_owner->pid = 0;
    r = -EAGAIN;
  }
  if (r == 0)
    f->inode->locker = f;
  return unlock_sim (s, r);
}

/* ---- Operations on names, clocks, randomness ---------------------------- */

static int
rename_live (struct sim *s, const char *from, const char *to)
{
  const struct name *source = tree_find (&s->live, from);
  const size_t n = parent_length (from);

  if (n != parent_length (to) || strncmp (from, to, n) != 0)
    return -EXDEV;
  if (source == NULL)
    return -ENOENT;
  if (source->inode->is_dir || is_dir (&s->live, to))
    return -EISDIR;
  if (strcmp (from, to) != 0)
    change_name (s, false, to, source->inode);
  return 0;
}

static int
sim_rename (struct vr_io *io, const char *from, const char *to)
{
  struct sim *s = lock_sim (io);
  char normal_from[PATH_MAX], normal_to[PATH_MAX];
  int r = enter_step (s, NULL, VR_SIM_NAME);

  if (r == 0)
    r = normalise (from, normal_from);
  if (r == 0)
    r = normalise (to, normal_to);
  if (r == 0)
    r = rename_live (s, normal_from, normal_to);
  return unlock_sim (s, r);
}

static int
sim_unlink (struct vr_io *io, const char *path)
{
  struct sim *s = lock_sim (io);
  char normal[PATH_MAX];
  const struct name *name;
  int r = enter_step (s, NULL, VR_SIM_NAME);

  if (r == 0)
    r = normalise (path, normal);
  if (r < 0)
    return unlock_sim (s, r);

  name = tree_find (&s->live, normal);
  if (is_dir (&s->live, normal))
    r = -EISDIR;
  else if (name == NULL)
    r = -ENOENT;
  else
    change_name (s, true, normal, name->inode);
  return unlock_sim (s, r);
}

static int
sim_mkdir (struct vr_io *io, const char *path)
{
  struct sim *s = lock_sim (io);
  char normal[PATH_MAX];
  int r = enter_step (s, NULL, VR_SIM_NAME);

  if (r == 0)
    r = normalise (path, normal);
  if (r < 0 || is_dir (&s->live, normal))
    return unlock_sim (s, r);

  if (tree_find (&s->live, normal) != NULL)
    r = -EEXIST;
  else if (!has_parent (&s->live, normal))
    r = -ENOENT;
  else
    change_name (s, false, normal, inode_new (s, true));
  return unlock_sim (s, r);
}

static int
sim_sync_dir (struct vr_io *io, const char *path)
{
  struct sim *s = lock_sim (io);
  char normal[PATH_MAX];
  struct name_op **link = &s->first_op;
  int r = enter_step (s, NULL, VR_SIM_NAME);

  if (r == 0)
    r = normalise (path, normal);
  if (r == 0 && !is_dir (&s->live, normal))
    r = tree_find (&s->live, normal) != NULL ? -ENOTDIR : -ENOENT;
  if (r < 0)
    return unlock_sim (s, r);

  while (*link != NULL) {
    if (is_in ((*link)->path, normal))
      finish_op (s, link, true);
    else
      link = &(*link)->next;
  }
  sweep (s);
  return unlock_sim (s, 0);
}

static uint64_t
sim_now_ns (struct vr_io *io)
{
  struct sim *s = lock_sim (io);
  const uint64_t ns = s->clock_ns;

  unlock_sim (s, 0);
  return ns;
}

static uint64_t
sim_realtime_ns (struct vr_io *io)
{
  return FIRST_REALTIME_NS + sim_now_ns (io) - FIRST_NS;
}

static int
sim_random (struct vr_io *io, void *buf, size_t n)
{
  struct sim *s = lock_sim (io);
  const int r = enter (s, NULL, 0);

  if (r == 0)
    random_bytes (s, buf, n);
  return unlock_sim (s, r);
}

static const struct vr_io_ops sim_ops = {
  .open = sim_open,
  .close = sim_close,
  .size = sim_size,
  .truncate = sim_truncate,
  .read = sim_read,
  .writev = sim_writev,
  .write_batch = sim_write_batch,
  .zero = sim_zero,
  .sync = sim_sync,
  .start_writeback = sim_start_writeback,
  .prefetch = sim_prefetch,
  .next_data = sim_next_data,
  .lock = sim_lock,
  .rename = sim_rename,
  .unlink = sim_unlink,
  .mkdir = sim_mkdir,
  .sync_dir = sim_sync_dir,
  .now_ns = sim_now_ns,
  .realtime_ns = sim_realtime_ns,
  .random = sim_random,
};

/* ---- The hand of fate --------------------------------------------------- */

struct vr_io *
vr_io_sim_new (uint64_t seed)
{
  struct sim *s = calloc (1, sizeof *s);

  if (s == NULL)
    return NULL;
  s->io.ops = &sim_ops;
  pthread_mutex_init (&s->mutex, NULL);
  s->rng = seed;
  s->clock_ns = FIRST_NS;
  s->last_op = &s->first_op;
  return &s->io;
}

void
vr_io_sim_free (struct vr_io *io)
{
  struct sim *s = sim_of (io);

  if (s == NULL)
    return;
  while (s->files != NULL) {
    struct sim_file *f = s->files;

    s->files = f->next;
    if (f->inode != NULL)
      f->inode->opens = 0;
    free (f);
  }
  while (s->first_op != NULL)
    finish_op (s, &s->first_op, false);
  tree_clear (&s->live);
  tree_clear (&s->durable);
  sweep (s);
  free (s->live.name);
  free (s->durable.name);
  pthread_mutex_destroy (&s->mutex);
  free (s);
}

/* The process and what it held are gone; a new one may start. */
static void
end_process (struct sim *s)
{
  for (struct sim_file *f = s->files; f != NULL; f = f->next) {
    if (f->inode == NULL)
      continue;
    f->inode->opens = 0;
    f->inode->locker = NULL;
    f->inode = NULL;
  }
  s->dead = false;
  s->die_at = 0;
}

void
vr_io_sim_crash (struct vr_io *io, const struct vr_sim_crash *crash)
{
  struct sim *s = lock_sim (io);

  end_process (s);
  names_crash (s, crash);
  sweep (s);
  for (struct inode *ino = s->inodes; ino != NULL; ino = ino->next)
    inode_crash (s, ino, crash);
  unlock_sim (s, 0);
}

void
vr_io_sim_kill (struct vr_io *io)
{
  struct sim *s = lock_sim (io);

  end_process (s);
  sweep (s);
  unlock_sim (s, 0);
}

void
vr_io_sim_sleep (struct vr_io *io, uint64_t ns)
{
  struct sim *s = lock_sim (io);

  s->clock_ns += ns;
  unlock_sim (s, 0);
}

void
vr_io_sim_fail (struct vr_io *io, unsigned mask, uint64_t n, int err,
                bool sticky)
{
  struct sim *s = lock_sim (io);

  s->fail.mask = mask;
  s->fail.n = n;
  s->fail.err = err;
  s->fail.sticky = sticky;
  unlock_sim (s, 0);
}

void
vr_io_sim_set_space (struct vr_io *io, uint64_t bytes)
{
  struct sim *s = lock_sim (io);

  s->space = bytes;
  unlock_sim (s, 0);
}

uint64_t
vr_io_sim_steps (struct vr_io *io)
{
  struct sim *s = lock_sim (io);
  const uint64_t steps = s->steps;

  unlock_sim (s, 0);
  return steps;
}

void
vr_io_sim_die_at (struct vr_io *io, uint64_t step)
{
  struct sim *s = lock_sim (io);

  s->die_at = step;
  s->dead = step != 0 && s->steps >= step;
  unlock_sim (s, 0);
}

static void
flip_pending (const struct inode *ino, uint64_t offset, uint8_t mask)
{
  for (struct pending *p = ino->first; p != NULL; p = p->next)
    if (p->kind == PENDING_WRITE && offset >= p->offset && offset < p->end)
      p->data[offset - p->offset] ^= mask;
}

int
vr_io_sim_flip (struct vr_io *io, const char *path, uint64_t offset,
                uint8_t mask)
{
  struct sim *s = lock_sim (io);
  char normal[PATH_MAX];
  const struct name *name;
  struct page *page;
  int r = normalise (path, normal);

  if (r < 0)
    return unlock_sim (s, r);
  name = tree_find (&s->live, normal);
  if (name == NULL)
    return unlock_sim (s, -ENOENT);
  if (offset >= name->inode->size)
    return unlock_sim (s, -EINVAL);

  page = make_page (name->inode, offset);
  page->now[offset % PAGE] ^= mask;
  page->hole = false;
  if (page->then != NULL)
    page->then[offset % PAGE] ^= mask;
  flip_pending (name->inode, offset, mask);
  return unlock_sim (s, 0);
}
