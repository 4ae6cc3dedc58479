/* SPDX-License-Identifier: BSD-3-Clause */
/* The encoder of delta.h. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <lz4.h>

#include "journal/hash.h"
#include "memsync/delta.h"

#define HEADER ((uint32_t) sizeof (struct vr_delta_header))
#define ENTRY ((uint32_t) sizeof (struct vr_delta_entry))
#define LINE_WORDS 8
#define LINES (VR_PAGE_WORDS / LINE_WORDS)

/* Pages come with any alignment, and the compiler must know. */
typedef uint64_t word_t __attribute__ ((aligned (1), may_alias));

struct hash {
  uint8_t bytes[16];
};

struct block {
  uint64_t pages;
  uint64_t *known;     /* one bit a page: the backup has what the shadow says;
                          NULL without a shadow */
  uint8_t *full;       /* shadow=full */
  struct hash *hashes; /* shadow=hash */
};

struct vr_encoder {
  struct vr_delta_config config;
  struct vr_delta_stats stats;
  bool broken; /* emit failed */

  uint32_t block;   /* of the payload that is being filled */
  uint32_t entries; /* in it; 0: empty */
  uint32_t used;    /* bytes of its body */
  uint32_t last;    /* where in the body the last entry is */
  uint8_t *plain;   /* header and body, VR_PAYLOAD_MAX */
  uint8_t *packed;  /* header and compressed body; NULL without LZ4 */

  uint32_t blocks;
  struct block block_of[];
};

/* ---- What differs ------------------------------------------------------- */

/* One bit for each 64 bytes: do they differ?  Clones of this for wider vectors
   gained 5 % on pages in the cache and nothing on others. */
static uint64_t
changed_lines (const word_t *a, const word_t *b)
{
  uint64_t changed = 0;

  for (unsigned line = 0; line < LINES; line++) {
    uint64_t diff = 0;

    for (unsigned i = 0; i < LINE_WORDS; i++)
      diff |= a[line * LINE_WORDS + i] ^ b[line * LINE_WORDS + i];
    changed |= (uint64_t) (diff != 0) << line;
  }
  return changed;
}

static bool
is_zero (const uint8_t *page)
{
  word_t first;

  /* Nearly every page that is not zero is told by its first word, and the
     rest equals the page moved on by a word. */
  memcpy (&first, page, sizeof first);
  return first == 0
         && memcmp (page, page + sizeof first, VR_PAGE_SIZE - sizeof first)
              == 0;
}

/* One bit for each word of a page that differs; returns how many do. */
static unsigned
changed_words (const word_t *a, const word_t *b, uint64_t lines,
               uint64_t ret[VR_PAGE_WORDS / 64])
{
  unsigned count = 0;

  memset (ret, 0, VR_PAGE_WORDS / 8);
  for (; lines; lines &= lines - 1) {
    const unsigned line = (unsigned) __builtin_ctzll (lines);
    uint64_t bits = 0;

    for (unsigned i = 0; i < LINE_WORDS; i++)
      bits |= (uint64_t) (a[line * LINE_WORDS + i] != b[line * LINE_WORDS + i])
              << i;
    ret[line / 8] |= bits << (line % 8 * 8);
    count += (unsigned) __builtin_popcountll (bits);
  }
  return count;
}

/* The first word at or behind position whose bit is `value`; VR_PAGE_WORDS if
   there is none. */
static unsigned
next_word (const uint64_t *bits, unsigned position, bool value)
{
  while (position < VR_PAGE_WORDS) {
    uint64_t b = bits[position / 64];

    if (!value)
      b = ~b;
    b >>= position % 64;
    if (b)
      return position + (unsigned) __builtin_ctzll (b);
    position = (position / 64 + 1) * 64;
  }
  return VR_PAGE_WORDS;
}

/* Write code for `count` words behind a skip; returns its size, or 0 when it
   does not fit the room. */
static uint32_t
code_run (uint8_t *out, uint32_t room, unsigned skip, const word_t *words,
          unsigned count)
{
  uint32_t n = 0;

  while (count > 0) {
    const unsigned s = skip > 255 ? 255 : skip;
    const unsigned c = skip > 255 ? 0 : count > 255 ? 255 : count;

    if (room - n < 2 + c * 8)
      return 0;
    out[n++] = (uint8_t) s;
    out[n++] = (uint8_t) c;
    memcpy (out + n, words, c * 8);
    n += c * 8;
    words += c;
    skip -= s;
    count -= c;
  }
  return n;
}

/* Code for what differs between two pages that do differ; returns its size,
   or 0 when a whole page is better. */
static uint32_t
code_page (uint8_t *out, uint32_t room, const uint8_t *old,
           const uint8_t *page, uint64_t lines)
{
  const word_t *now = (const word_t *) page;
  uint64_t bits[VR_PAGE_WORDS / 64];
  unsigned position = 0, start, end;
  uint32_t size = 0;

  if (changed_words ((const word_t *) old, now, lines, bits) * 8 > room)
    return 0;
  while ((start = next_word (bits, position, true)) < VR_PAGE_WORDS) {
    uint32_t n;

    end = next_word (bits, start, false);
    n = code_run (out + size, room - size, start - position, now + start,
                  end - start);
    if (n == 0)
      return 0;
    size += n;
    position = end;
  }
  return size;
}

/* ---- Payloads ----------------------------------------------------------- */

static uint8_t *
body (const struct vr_encoder *e)
{
  return e->plain + HEADER;
}

/* Compress the body into e->packed; the size, or 0 if it is not worth it. */
static uint32_t
pack (const struct vr_encoder *e)
{
  const int most = (int) (e->used - e->used / 16);
  int n;

  if (!e->packed)
    return 0;
  n = LZ4_compress_default ((const char *) body (e),
                            (char *) e->packed + HEADER, (int) e->used, most);
  return n > 0 ? (uint32_t) n : 0;
}

static int
emit (struct vr_encoder *e)
{
  struct vr_delta_header h = {
    .magic = VR_DELTA_MAGIC, .version = VR_DELTA_VERSION, .block = e->block,
    .entries = e->entries, .body_size = e->used,
  };
  uint8_t *payload = e->plain;
  uint32_t packed;
  int err;

  if (e->entries == 0)
    return 0;
  assert (e->used <= VR_DELTA_BODY_MAX);
  h.stored_size = e->used;
  packed = pack (e);
  if (packed > 0) {
    h.flags = VR_DELTA_LZ4;
    h.stored_size = packed;
    payload = e->packed;
  }
  memcpy (payload, &h, sizeof h);
  e->entries = e->used = 0;
  err = e->config.emit (e->config.opaque, payload, HEADER + h.stored_size);
  if (err < 0) {
    e->broken = true;
    return err;
  }
  e->stats.payloads++;
  e->stats.payload_bytes += HEADER + h.stored_size;
  return 0;
}

/* Have room for `size` more bytes about this block. */
static int
make_room (struct vr_encoder *e, uint32_t block, uint32_t size)
{
  int err;

  if (e->entries > 0
      && (e->block != block || VR_DELTA_BODY_MAX - e->used < size)) {
    err = emit (e);
    if (err < 0)
      return err;
  }
  e->block = block;
  return 0;
}

static void
add_entry (struct vr_encoder *e, const struct vr_delta_entry *entry)
{
  e->last = e->used;
  memcpy (body (e) + e->used, entry, sizeof *entry);
  e->used += ENTRY;
  e->entries++;
}

/* Let the last entry cover one page more, if it is of this kind and ends just
   before it. */
static bool
extend (struct vr_encoder *e, uint8_t kind, uint64_t page)
{
  struct vr_delta_entry entry;

  if (e->entries == 0)
    return false;
  memcpy (&entry, body (e) + e->last, sizeof entry);
  if (entry.kind != kind || entry.page + entry.pages != page
      || entry.pages == UINT32_MAX)
    return false;
  entry.pages++;
  memcpy (body (e) + e->last, &entry, sizeof entry);
  return true;
}

static int
put_zero (struct vr_encoder *e, uint32_t block, uint64_t page)
{
  const struct vr_delta_entry entry
    = { .page = page, .pages = 1, .kind = VR_DELTA_ZERO };
  int err = make_room (e, block, ENTRY);

  if (err == 0 && !extend (e, VR_DELTA_ZERO, page))
    add_entry (e, &entry);
  return err;
}

static int
put_whole (struct vr_encoder *e, uint32_t block, uint64_t page,
           const uint8_t *data)
{
  const struct vr_delta_entry entry
    = { .page = page, .pages = 1, .kind = VR_DELTA_WHOLE };
  int err = make_room (e, block, ENTRY + VR_PAGE_SIZE);

  if (err < 0)
    return err;
  if (!extend (e, VR_DELTA_WHOLE, page))
    add_entry (e, &entry);
  memcpy (body (e) + e->used, data, VR_PAGE_SIZE);
  e->used += VR_PAGE_SIZE;
  return 0;
}

/* 1: the page is better sent whole. */
static int
put_words (struct vr_encoder *e, uint32_t block, uint64_t page,
           const uint8_t *old, const uint8_t *data, uint64_t lines)
{
  struct vr_delta_entry entry
    = { .page = page, .pages = 1, .kind = VR_DELTA_WORDS };
  int err = make_room (e, block, ENTRY + VR_DELTA_CODE_MAX);
  uint32_t size;

  if (err < 0)
    return err;
  size = code_page (body (e) + e->used + ENTRY, VR_DELTA_CODE_MAX, old, data,
                    lines);
  if (size == 0)
    return 1;
  entry.code_size = (uint16_t) size;
  add_entry (e, &entry);
  e->used += size;
  return 0;
}

/* ---- Pages -------------------------------------------------------------- */

static bool
is_known (const struct block *b, uint64_t page)
{
  return b->known[page / 64] >> (page % 64) & 1;
}

static void
set_known (struct block *b, uint64_t page)
{
  b->known[page / 64] |= UINT64_C (1) << (page % 64);
}

static int
put_page (struct vr_encoder *e, uint32_t block, uint64_t page,
          const uint8_t *data)
{
  if (is_zero (data)) {
    e->stats.zero++;
    return put_zero (e, block, page);
  }
  e->stats.whole++;
  return put_whole (e, block, page, data);
}

static int
page_with_hash (struct vr_encoder *e, uint32_t block, uint64_t page,
                const uint8_t *data)
{
  struct block *b = &e->block_of[block];
  struct hash hash;

  vr_hash128 (data, VR_PAGE_SIZE, hash.bytes);
  if (is_known (b, page)
      && memcmp (&hash, &b->hashes[page], sizeof hash) == 0) {
    e->stats.unchanged++;
    return 0;
  }
  b->hashes[page] = hash;
  set_known (b, page);
  return put_page (e, block, page, data);
}

static int
page_with_shadow (struct vr_encoder *e, uint32_t block, uint64_t page,
                  const uint8_t *data)
{
  struct block *b = &e->block_of[block];
  uint8_t *old = b->full + page * VR_PAGE_SIZE;
  uint64_t lines;
  int r = 1;

  if (is_known (b, page)) {
    lines = changed_lines ((const word_t *) old, (const word_t *) data);
    if (lines == 0) {
      e->stats.unchanged++;
      return 0;
    }
    if (!is_zero (data))
      r = put_words (e, block, page, old, data, lines);
    if (r == 0)
      e->stats.words++;
  }
  memcpy (old, data, VR_PAGE_SIZE);
  set_known (b, page);
  return r == 1 ? put_page (e, block, page, data) : r;
}

static int
encode_page (struct vr_encoder *e, uint32_t block, uint64_t page,
             const uint8_t *data)
{
  e->stats.pages++;
  switch (e->config.shadow) {
  case VR_SHADOW_FULL:
    return page_with_shadow (e, block, page, data);
  case VR_SHADOW_HASH:
    return page_with_hash (e, block, page, data);
  default:
    return put_page (e, block, page, data);
  }
}

int
vr_encoder_pages (struct vr_encoder *e, uint32_t block, uint64_t first_page,
                  uint64_t pages, const void *data)
{
  const uint8_t *p = data;
  int err = 0;

  if (e->broken)
    return -ECANCELED;
  if (block >= e->blocks || first_page > e->block_of[block].pages
      || pages > e->block_of[block].pages - first_page)
    return -ERANGE;
  for (uint64_t i = 0; i < pages && err == 0; i++)
    err = encode_page (e, block, first_page + i, p + i * VR_PAGE_SIZE);
  return err;
}

int
vr_encoder_flush (struct vr_encoder *e)
{
  return e->broken ? -ECANCELED : emit (e);
}

void
vr_encoder_forget (struct vr_encoder *e)
{
  e->broken = false;
  e->entries = e->used = 0;
  if (e->config.shadow == VR_SHADOW_NONE)
    return;
  for (uint32_t i = 0; i < e->blocks; i++)
    memset (e->block_of[i].known, 0, (e->block_of[i].pages + 63) / 64 * 8);
}

void
vr_encoder_stats (const struct vr_encoder *e, struct vr_delta_stats *ret)
{
  *ret = e->stats;
}

/* ---- Life --------------------------------------------------------------- */

static int
check_layout (const struct vr_ram_layout *layout)
{
  if (layout->blocks > VR_RAM_BLOCKS_MAX)
    return -EINVAL;
  for (uint32_t i = 0; i < layout->blocks; i++)
    if (layout->pages[i] > VR_RAM_PAGES_MAX)
      return -EINVAL;
  return 0;
}

static int
init_block (struct block *b, uint64_t pages, enum vr_shadow shadow)
{
  void *p;

  b->pages = pages;
  if (pages == 0 || shadow == VR_SHADOW_NONE)
    return 0;
  b->known = calloc ((size_t) (pages + 63) / 64, 8);
  if (!b->known)
    return -ENOMEM;
  if (shadow == VR_SHADOW_HASH) {
    b->hashes = calloc ((size_t) pages, sizeof *b->hashes);
    return b->hashes ? 0 : -ENOMEM;
  }
  p = mmap (NULL, (size_t) pages * VR_PAGE_SIZE, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    return -ENOMEM;
  b->full = p;
  return 0;
}

static void
fini_block (struct block *b)
{
  free (b->known);
  free (b->hashes);
  if (b->full)
    munmap (b->full, (size_t) b->pages * VR_PAGE_SIZE);
}

static int
init_encoder (struct vr_encoder *e, const struct vr_ram_layout *layout)
{
  int err = 0;

  e->plain = malloc (VR_PAYLOAD_MAX);
  if (!e->plain)
    return -ENOMEM;
  if (e->config.lz4) {
    e->packed = malloc (VR_PAYLOAD_MAX);
    if (!e->packed)
      return -ENOMEM;
  }
  for (uint32_t i = 0; i < e->blocks && err == 0; i++)
    err = init_block (&e->block_of[i], layout->pages[i], e->config.shadow);
  return err;
}

int
vr_encoder_new (const struct vr_ram_layout *layout,
                const struct vr_delta_config *config, struct vr_encoder **ret)
{
  struct vr_encoder *e;
  int err = check_layout (layout);

  if (err < 0)
    return err;
  e = calloc (1, sizeof *e + layout->blocks * sizeof e->block_of[0]);
  if (!e)
    return -ENOMEM;
  e->config = *config;
  e->blocks = layout->blocks;
  err = init_encoder (e, layout);
  if (err < 0) {
    vr_encoder_free (e);
    return err;
  }
  *ret = e;
  return 0;
}

void
vr_encoder_free (struct vr_encoder *e)
{
  if (!e)
    return;
  for (uint32_t i = 0; i < e->blocks; i++)
    fini_block (&e->block_of[i]);
  free (e->plain);
  free (e->packed);
  free (e);
}
