/* SPDX-License-Identifier: BSD-3-Clause */
/* The decoder of delta.h.
 *
 * Two passes of one walk: the first checks the whole body, the second, which
 * sees the same bytes, applies it.
 */
#include <errno.h>
#include <string.h>

#include <lz4.h>

#include "memsync/delta.h"

struct walk {
  const uint8_t *p;
  size_t left;
  uint32_t block;
  uint64_t pages;                     /* of the block */
  const struct vr_delta_apply *apply; /* NULL in the first pass */
};

/* Take n bytes off the front; NULL if there are not so many. */
static const uint8_t *
take (struct walk *w, size_t n)
{
  const uint8_t *p = w->p;

  if (n > w->left)
    return NULL;
  w->p += n;
  w->left -= n;
  return p;
}

static int
zero (const struct walk *w, const struct vr_delta_entry *e)
{
  if (!w->apply)
    return 0;
  return w->apply->zero (w->apply->opaque, w->block, e->page * VR_PAGE_SIZE,
                         (uint64_t) e->pages * VR_PAGE_SIZE);
}

static int
whole (struct walk *w, const struct vr_delta_entry *e)
{
  const uint8_t *data;

  if (e->pages > VR_DELTA_BODY_MAX / VR_PAGE_SIZE)
    return -EBADMSG;
  data = take (w, (size_t) e->pages * VR_PAGE_SIZE);
  if (!data)
    return -EBADMSG;
  if (!w->apply)
    return 0;
  return w->apply->write (w->apply->opaque, w->block, e->page * VR_PAGE_SIZE,
                          data, e->pages * VR_PAGE_SIZE);
}

/* One skip and run of a page's code, at *position. */
static int
run (const struct walk *w, struct walk *code, uint64_t page,
     unsigned *position)
{
  const uint8_t *token = take (code, 2), *words;
  unsigned at;

  if (!token)
    return -EBADMSG;
  at = *position + token[0];
  *position = at + token[1];
  words = take (code, token[1] * 8u);
  if (!words || *position > VR_PAGE_WORDS)
    return -EBADMSG;
  if (!w->apply || token[1] == 0)
    return 0;
  return w->apply->write (w->apply->opaque, w->block,
                          page * VR_PAGE_SIZE + at * 8u, words,
                          token[1] * 8u);
}

static int
words (struct walk *w, const struct vr_delta_entry *e)
{
  struct walk code = { .left = e->code_size };
  unsigned position = 0;
  int err = 0;

  code.p = take (w, e->code_size);
  if (!code.p || e->pages != 1 || e->code_size == 0)
    return -EBADMSG;
  while (code.left > 0 && err == 0)
    err = run (w, &code, e->page, &position);
  return err;
}

static int
entry (struct walk *w)
{
  const uint8_t *p = take (w, sizeof (struct vr_delta_entry));
  struct vr_delta_entry e;

  if (!p)
    return -EBADMSG;
  memcpy (&e, p, sizeof e);
  if (e.reserved != 0 || e.pages == 0
      || (e.kind != VR_DELTA_WORDS && e.code_size != 0))
    return -EBADMSG;
  if (e.page > w->pages || e.pages > w->pages - e.page)
    return -ERANGE;
  switch (e.kind) {
  case VR_DELTA_ZERO:
    return zero (w, &e);
  case VR_DELTA_WHOLE:
    return whole (w, &e);
  case VR_DELTA_WORDS:
    return words (w, &e);
  default:
    return -EBADMSG;
  }
}

static int
walk (struct walk w, uint32_t entries)
{
  int err = 0;

  for (uint32_t i = 0; i < entries && err == 0; i++)
    err = entry (&w);
  if (err == 0 && w.left > 0)
    return -EBADMSG;
  return err;
}

static int
check_header (const struct vr_delta_header *h, size_t size)
{
  if (h->magic != VR_DELTA_MAGIC)
    return -EBADMSG;
  if (h->version != VR_DELTA_VERSION || (h->flags & ~VR_DELTA_FLAGS))
    return -EPROTO;
  if (h->reserved != 0 || h->entries == 0
      || h->stored_size != size - sizeof *h
      || h->body_size > VR_DELTA_BODY_MAX)
    return -EBADMSG;
  if (!(h->flags & VR_DELTA_LZ4) && h->body_size != h->stored_size)
    return -EBADMSG;
  return 0;
}

/* The body of a payload, decompressed into scratch if need be. */
static int
find_body (const struct vr_delta_header *h, const uint8_t *stored,
           void *scratch, const uint8_t **ret)
{
  int n;

  if (!(h->flags & VR_DELTA_LZ4)) {
    *ret = stored;
    return 0;
  }
  n = LZ4_decompress_safe ((const char *) stored, scratch,
                           (int) h->stored_size, (int) h->body_size);
  if (n < 0 || (uint32_t) n != h->body_size)
    return -EBADMSG;
  *ret = scratch;
  return 0;
}

int
vr_delta_decode (const void *payload, size_t size,
                 const struct vr_ram_layout *layout, void *scratch,
                 const struct vr_delta_apply *apply)
{
  struct vr_delta_header h;
  struct walk w = { .p = NULL };
  int err;

  if (size < sizeof h || size > VR_PAYLOAD_MAX)
    return -EBADMSG;
  memcpy (&h, payload, sizeof h);
  err = check_header (&h, size);
  if (err < 0)
    return err;
  if (h.block >= layout->blocks)
    return -ERANGE;
  err = find_body (&h, (const uint8_t *) payload + sizeof h, scratch, &w.p);
  if (err < 0)
    return err;

  w.left = h.body_size;
  w.block = h.block;
  w.pages = layout->pages[h.block];
  err = walk (w, h.entries);
  if (err < 0 || !apply)
    return err;
  w.apply = apply;
  return walk (w, h.entries);
}

int
vr_delta_write_mapped (void *opaque, uint32_t block, uint64_t offset,
                       const void *data, uint32_t length)
{
  uint8_t *const *blocks = opaque;

  memcpy (blocks[block] + offset, data, length);
  return 0;
}

int
vr_delta_zero_mapped (void *opaque, uint32_t block, uint64_t offset,
                      uint64_t length)
{
  uint8_t *const *blocks = opaque;

  memset (blocks[block] + offset, 0, (size_t) length);
  return 0;
}
