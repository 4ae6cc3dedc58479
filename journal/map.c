/* SPDX-License-Identifier: BSD-3-Clause */
/* See map.h.
 *
 * Invariants:
 *
 * M1  There is always a leaf.  A leaf is empty only if it is the only one.
 * M2  Extents are disjoint and ordered, within a leaf and across leaves.
 * M3  key[i] is the first offset of leaf i; key[0] is never looked at.
 * M4  After vr_map_reserve (n) there are at least leaves_needed (m, n) spare
 *     leaves, and as many free places in the arrays.  Only a split uses them
 *     up: a leaf that is given back leaves the spare ones alone.
 *
 * An operation adds at most two extents and splits at most one leaf.  It makes
 * sure of a spare leaf before it changes anything.
 *
 * Nothing is merged: two records are never adjacent in the log, there is a
 * header between them.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "journal/map.h"

#define VR_MAP_LEAF 128
#define VR_MAP_END_SPLIT (VR_MAP_LEAF / 4) /* moved by a split at the end */
#define VR_MAP_JOIN (VR_MAP_LEAF / 2)      /* two leaves this small are one */
#define VR_MAP_SPARES 16                   /* kept when leaves are released */
#define LINE 64                            /* of the cache, in bytes */

struct place {
  uint64_t length;
  uint64_t lsn;
  uint64_t kind;
};

/* The offsets are apart from the rest so that a search touches few lines. */
struct leaf {
  struct leaf *next; /* among the spare ones */
  size_t count;
  uint64_t offset[VR_MAP_LEAF];
  struct place place[VR_MAP_LEAF];
};

struct vr_map {
  uint64_t *key;
  struct leaf **leaf;
  size_t nr_leaves;
  size_t capacity; /* of both arrays */
  size_t count;    /* extents */
  struct leaf *spare;
  size_t nr_spare;
};

struct position {
  size_t leaf;
  size_t index; /* may be one behind the last extent of the leaf */
};

static struct vr_extent
get (const struct leaf *l, size_t i)
{
  return (struct vr_extent) {
    .offset = l->offset[i],
    .length = l->place[i].length,
    .lsn = l->place[i].lsn,
    .kind = l->place[i].kind,
  };
}

static void
put (struct leaf *l, size_t i, const struct vr_extent *x)
{
  l->offset[i] = x->offset;
  l->place[i].length = x->length;
  l->place[i].lsn = x->lsn;
  l->place[i].kind = x->kind;
}

/* Move n extents; the two leaves may be one. */
static void
move (struct leaf *to, size_t to_index, const struct leaf *from,
      size_t from_index, size_t n)
{
  memmove (&to->offset[to_index], &from->offset[from_index],
           n * sizeof to->offset[0]);
  memmove (&to->place[to_index], &from->place[from_index],
           n * sizeof to->place[0]);
}

static uint64_t
end_of (const struct vr_extent *x)
{
  return x->offset + x->length;
}

static void
cut_front (struct vr_extent *x, uint64_t bytes)
{
  x->offset += bytes;
  x->length -= bytes;
  if (x->kind == VR_EXTENT_DATA)
    x->lsn += bytes;
}

/* Search.  */

/* The index of the last of n sorted keys that is <= offset, or 0.  Written so
   that the compiler needs no branch in the loop: on random offsets half of
   them would be mispredicted. */
static size_t
search (const uint64_t *key, size_t n, uint64_t offset)
{
  size_t base = 0;

  while (n > 1) {
    size_t half = n / 2;

    base = key[base + half] <= offset ? base + half : base;
    n -= half;
  }
  return base;
}

/* The first extent that ends behind offset: it holds offset or follows it. */
static struct position
find (const struct vr_map *m, uint64_t offset)
{
  struct position p = { .leaf = search (m->key, m->nr_leaves, offset) };
  const struct leaf *l = m->leaf[p.leaf];

  /* The search would miss the cache once per step; so it misses all at once.
     In a large map this takes a quarter off an insert. */
  for (size_t i = 0; i < VR_MAP_LEAF; i += LINE / sizeof l->offset[0])
    __builtin_prefetch (&l->offset[i]);
  p.index = search (l->offset, l->count, offset);
  /* The distance wraps when the extent follows offset, and is huge then. */
  if (l->count > 0 && l->offset[p.index] <= offset &&
      offset - l->offset[p.index] >= l->place[p.index].length)
    p.index++;
  return p;
}

/* Go from behind the last extent of a leaf to the first of the next.  False
   if there is none. */
static bool
settle (const struct vr_map *m, struct position *p)
{
  if (p->index == m->leaf[p->leaf]->count) {
    p->leaf++;
    p->index = 0;
  }
  return p->leaf < m->nr_leaves && m->leaf[p->leaf]->count > 0;
}

/* Memory.  */

/* How many leaves n operations can split at most, and one more because every
 * operation insists on a spare one.
 *
 * Say a leaf of c extents has a debt of c - VR_MAP_LEAF / 2, if that is
 * positive.  A split lowers the debt by VR_MAP_END_SPLIT or more, an operation
 * raises it by two at most, and joining leaves makes none.
 */
static size_t
leaves_needed (const struct vr_map *m, size_t n)
{
  size_t splits = m->nr_leaves * (VR_MAP_LEAF / 2) / VR_MAP_END_SPLIT +
                  n / (VR_MAP_END_SPLIT / 2);

  return n <= splits ? n : splits + 1;
}

static int
grow_arrays (struct vr_map *m, size_t capacity)
{
  uint64_t *key;
  struct leaf **leaf;

  if (capacity <= m->capacity)
    return 0;
  if (capacity < m->capacity * 2)
    capacity = m->capacity * 2;
  key = realloc (m->key, capacity * sizeof *key);
  if (!key)
    return -ENOMEM;
  m->key = key;
  leaf = realloc (m->leaf, capacity * sizeof *leaf);
  if (!leaf)
    return -ENOMEM;
  m->leaf = leaf;
  m->capacity = capacity;
  return 0;
}

static int
make_spares (struct vr_map *m, size_t n)
{
  int r = grow_arrays (m, m->nr_leaves + n);

  if (r < 0)
    return r;
  while (m->nr_spare < n) {
    struct leaf *l = malloc (sizeof *l);

    if (!l)
      return -ENOMEM;
    l->next = m->spare;
    m->spare = l;
    m->nr_spare++;
  }
  return 0;
}

static struct leaf *
take_spare (struct vr_map *m)
{
  struct leaf *l = m->spare;

  assert (l && m->nr_leaves < m->capacity);
  m->spare = l->next;
  m->nr_spare--;
  l->count = 0;
  return l;
}

static void
release (struct vr_map *m, struct leaf *l)
{
  if (m->nr_spare >= VR_MAP_SPARES) {
    free (l);
    return;
  }
  l->next = m->spare;
  m->spare = l;
  m->nr_spare++;
}

/* Changes.  */

static void
refresh_key (struct vr_map *m, size_t leaf)
{
  if (m->leaf[leaf]->count > 0)
    m->key[leaf] = m->leaf[leaf]->offset[0];
}

/* Split the full leaf at p; p moves along.  A run of appends leaves its leaves
   three quarters full; anything else, half full. */
static void
split (struct vr_map *m, struct position *p)
{
  struct leaf *left = m->leaf[p->leaf];
  struct leaf *right = take_spare (m);
  size_t at = p->index == left->count ? left->count - VR_MAP_END_SPLIT
                                      : VR_MAP_LEAF / 2;
  size_t i = p->leaf + 1;

  right->count = left->count - at;
  move (right, 0, left, at, right->count);
  left->count = at;
  memmove (&m->key[i + 1], &m->key[i], (m->nr_leaves - i) * sizeof m->key[0]);
  memmove (&m->leaf[i + 1], &m->leaf[i],
           (m->nr_leaves - i) * sizeof m->leaf[0]);
  m->leaf[i] = right;
  m->nr_leaves++;
  refresh_key (m, i);
  if (p->index > at) {
    p->leaf = i;
    p->index -= at;
  }
}

/* Put n (one or two) extents in at p. */
static void
add (struct vr_map *m, struct position p, const struct vr_extent *x, size_t n)
{
  struct leaf *l;

  if (m->leaf[p.leaf]->count + n > VR_MAP_LEAF)
    split (m, &p);
  l = m->leaf[p.leaf];
  move (l, p.index + n, l, p.index, l->count - p.index);
  for (size_t i = 0; i < n; i++)
    put (l, p.index + i, &x[i]);
  l->count += n;
  m->count += n;
  refresh_key (m, p.leaf);
}

/* Join two neighbours if they are small.  The right one is gone then. */
static bool
join (struct vr_map *m, struct leaf **left, struct leaf *right)
{
  if ((*left)->count == 0) {
    release (m, *left);
    *left = right;
    return true;
  }
  if (right->count > 0 && (*left)->count + right->count > VR_MAP_JOIN)
    return false;
  move (*left, (*left)->count, right, 0, right->count);
  (*left)->count += right->count;
  release (m, right);
  return true;
}

/* Bring back M1 and M3 after extents were taken out of leaves first..last. */
static void
tidy (struct vr_map *m, size_t first, size_t last)
{
  size_t to = first > 0 ? first - 1 : 0;
  size_t end = last + 2 < m->nr_leaves ? last + 2 : m->nr_leaves;
  size_t rest = m->nr_leaves - end;

  refresh_key (m, to);
  for (size_t from = to + 1; from < end; from++) {
    if (!join (m, &m->leaf[to], m->leaf[from]))
      m->leaf[++to] = m->leaf[from];
    refresh_key (m, to);
  }
  to++;
  if (to < end) {
    memmove (&m->key[to], &m->key[end], rest * sizeof m->key[0]);
    memmove (&m->leaf[to], &m->leaf[end], rest * sizeof m->leaf[0]);
    m->nr_leaves = to + rest;
  }
}

/* How many bytes at the front of the extent are older than lsn. */
static uint64_t
older_bytes (const struct vr_extent *x, uint64_t lsn)
{
  if (x->lsn >= lsn)
    return 0;
  if (x->kind == VR_EXTENT_DATA && lsn - x->lsn < x->length)
    return lsn - x->lsn;
  return x->length;
}

/* The extent at p begins before offset: drop its older bytes in [offset, end).
   This may split it, which needs a spare leaf. */
static void
drop_within (struct vr_map *m, struct position p, uint64_t offset,
             uint64_t end, uint64_t lsn)
{
  struct leaf *l = m->leaf[p.leaf];
  struct vr_extent x = get (l, p.index);
  uint64_t gone = older_bytes (&x, lsn);

  if (gone > end - x.offset)
    gone = end - x.offset;
  if (gone <= offset - x.offset)
    return;
  l->place[p.index].length = offset - x.offset;
  if (gone < x.length) {
    cut_front (&x, gone);
    p.index++;
    add (m, p, &x, 1);
  }
}

/* From index i on, drop older bytes before end. */
static void
thin (struct vr_map *m, struct leaf *l, size_t i, uint64_t end, uint64_t lsn)
{
  size_t to = i;

  for (; i < l->count && l->offset[i] < end; i++) {
    struct vr_extent x = get (l, i);
    uint64_t gone = older_bytes (&x, lsn);

    if (gone > end - x.offset)
      gone = end - x.offset;
    if (gone == x.length)
      continue;
    cut_front (&x, gone);
    put (l, to++, &x);
  }
  if (to == i)
    return;
  move (l, to, l, i, l->count - i);
  m->count -= i - to;
  l->count -= i - to;
}

static void
drop (struct vr_map *m, uint64_t offset, uint64_t end, uint64_t lsn)
{
  struct position p = find (m, offset);
  size_t last;

  if (p.index < m->leaf[p.leaf]->count &&
      m->leaf[p.leaf]->offset[p.index] < offset) {
    drop_within (m, p, offset, end, lsn);
    p = find (m, offset);
    /* Still there: it is newer. */
    if (p.index < m->leaf[p.leaf]->count &&
        m->leaf[p.leaf]->offset[p.index] < offset)
      p.index++;
  }
  thin (m, m->leaf[p.leaf], p.index, end, lsn);
  last = p.leaf;
  while (last + 1 < m->nr_leaves && m->key[last + 1] < end)
    thin (m, m->leaf[++last], 0, end, lsn);
  if (last > p.leaf || m->leaf[last]->count < VR_MAP_JOIN / 2)
    tidy (m, p.leaf, last);
  else
    refresh_key (m, last);
}

/* The extent at p reaches beyond *e on both sides. */
static void
insert_within (struct vr_map *m, struct position p, const struct vr_extent *e)
{
  struct leaf *l = m->leaf[p.leaf];
  struct vr_extent x[2] = { *e, get (l, p.index) };

  l->place[p.index].length = e->offset - x[1].offset;
  cut_front (&x[1], end_of (e) - x[1].offset);
  p.index++;
  add (m, p, x, 2);
}

int
vr_map_insert (struct vr_map *m, const struct vr_extent *e)
{
  struct position p, at;
  struct vr_extent old;
  uint64_t end = end_of (e);
  int r;

  assert (e->length > 0 && end > e->offset);
  assert (e->lsn < UINT64_MAX);
  r = make_spares (m, 1);
  if (r < 0)
    return r;

  p = at = find (m, e->offset);
  if (!settle (m, &p) || m->leaf[p.leaf]->offset[p.index] >= end)
    add (m, at, e, 1);
  else {
    old = get (m->leaf[p.leaf], p.index);
    if (old.offset == e->offset && old.length == e->length)
      put (m->leaf[p.leaf], p.index, e);
    else if (old.offset < e->offset && end_of (&old) > end)
      insert_within (m, p, e);
    else {
      drop (m, e->offset, end, UINT64_MAX);
      add (m, find (m, e->offset), e, 1);
    }
  }
  return 0;
}

int
vr_map_remove_older (struct vr_map *m, uint64_t offset, uint64_t length,
                     uint64_t lsn)
{
  int r;

  assert (offset + length >= offset);
  r = make_spares (m, 1);
  if (r < 0)
    return r;
  if (length > 0)
    drop (m, offset, offset + length, lsn);
  return 0;
}

int
vr_map_reserve (struct vr_map *m, size_t inserts)
{
  return make_spares (m, leaves_needed (m, inserts));
}

/* The rest.  */

bool
vr_map_next (const struct vr_map *m, uint64_t offset, uint64_t end,
             struct vr_extent *ret)
{
  struct position p;

  if (offset >= end)
    return false;
  p = find (m, offset);
  if (!settle (m, &p) || m->leaf[p.leaf]->offset[p.index] >= end)
    return false;
  *ret = get (m->leaf[p.leaf], p.index);
  if (ret->offset < offset)
    cut_front (ret, offset - ret->offset);
  if (ret->length > end - ret->offset)
    ret->length = end - ret->offset;
  return true;
}

struct vr_map *
vr_map_new (void)
{
  struct vr_map *m = calloc (1, sizeof *m);

  if (!m)
    return NULL;
  if (make_spares (m, 1) < 0) {
    vr_map_free (m);
    return NULL;
  }
  m->leaf[0] = take_spare (m);
  m->nr_leaves = 1;
  return m;
}

void
vr_map_free (struct vr_map *m)
{
  if (!m)
    return;
  for (size_t i = 0; i < m->nr_leaves; i++)
    free (m->leaf[i]);
  while (m->spare) {
    struct leaf *l = m->spare;

    m->spare = l->next;
    free (l);
  }
  free (m->key);
  free (m->leaf);
  free (m);
}

void
vr_map_clear (struct vr_map *m)
{
  for (size_t i = 1; i < m->nr_leaves; i++)
    release (m, m->leaf[i]);
  m->nr_leaves = 1;
  m->leaf[0]->count = 0;
  m->count = 0;
}

size_t
vr_map_count (const struct vr_map *m)
{
  return m->count;
}

size_t
vr_map_memory (const struct vr_map *m)
{
  return sizeof *m + m->capacity * (sizeof *m->key + sizeof *m->leaf) +
         (m->nr_leaves + m->nr_spare) * sizeof (struct leaf);
}

static void
check (bool holds)
{
  if (!holds)
    abort ();
}

void
vr_map_assert_valid (const struct vr_map *m)
{
  size_t count = 0, spares = 0;
  uint64_t end = 0;

  check (m->nr_leaves > 0 && m->nr_leaves <= m->capacity);
  for (size_t i = 0; i < m->nr_leaves; i++) {
    const struct leaf *l = m->leaf[i];

    check (l->count <= VR_MAP_LEAF && (l->count > 0 || m->nr_leaves == 1));
    check (l->count == 0 || m->key[i] == l->offset[0]);
    for (size_t j = 0; j < l->count; j++) {
      check (l->offset[j] >= end);
      end = l->offset[j] + l->place[j].length;
      check (end > l->offset[j]);
      check (l->place[j].kind >= VR_EXTENT_DATA &&
             l->place[j].kind <= VR_EXTENT_TRIM);
    }
    count += l->count;
  }
  for (const struct leaf *l = m->spare; l; l = l->next)
    spares++;
  check (count == m->count && spares == m->nr_spare);
}
