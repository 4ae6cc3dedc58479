/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages of guest memory as payloads of log records, and back.
 *
 * The encoder is fed the dirty pages of an epoch.  It leaves out what the
 * backup has already, says what changed for the rest, and hands out payloads
 * of at most VR_PAYLOAD_MAX bytes.  The decoder checks a payload against the
 * layout of the RAM and applies it to an image.
 *
 * WHAT IS SENT OF A PAGE
 *
 *   shadow=full  memory as large as the guest's: the last shipped page is
 *                kept.  An unchanged page is dropped; of a changed one only
 *                the changed words are sent, or all of it when that is
 *                shorter.
 *   shadow=hash  16 bytes a page: XXH3-128 of the last shipped page.  An
 *                unchanged page is dropped, a changed one sent whole.
 *   shadow=none  every page is sent whole.
 *
 * In each mode a page of zeros costs no data.  Changed words are found by
 * XOR, but what is sent are their new values: redo of a payload is then
 * idempotent, so a backup that dies in the middle of an apply applies the
 * epoch again and has the same bytes.  (XOR words, applied twice, undo
 * themselves.)  For the same reason a payload decodes to right contents on
 * any image that has all payloads before it, whether or not it has some of
 * those behind it, as long as those are then applied too.
 *
 * THE PAYLOAD
 *
 *   payload:
 *      0  struct vr_delta_header           32 bytes
 *     32  body, stored_size bytes: as it is, or one LZ4 block that
 *         decompresses to exactly body_size bytes
 *
 *   body: `entries` times
 *      0  struct vr_delta_entry            16 bytes
 *     16  data:  ZERO   none
 *                WHOLE  pages * 4096 bytes, the pages
 *                WORDS  code_size bytes of code
 *
 *   code: changes to one page of 512 words of 8 bytes.  With position = 0 at
 *   first, until code_size is used up:
 *      0  uint8_t skip       position += skip
 *      1  uint8_t count      words at position become the words that follow;
 *      2  count words        position += count
 *   The position never gets beyond 512.  A skip of more than 255 words is
 *   two of these, the first with count 0; a run of more than 255 words is
 *   two, the second with skip 0.
 *
 * A payload is valid if and only if the magic, version and flags are known,
 * reserved fields are 0, the block is one of the layout's, stored_size is
 * what follows the header, body_size is at most VR_DELTA_BODY_MAX and, without
 * LZ4, equals stored_size; and the entries, with their data, fill the body
 * exactly and name only pages of the block.
 *
 * All integers are little-endian.  A payload has no checksum: the record that
 * carries it has one.
 */
#ifndef VR_DELTA_H
#define VR_DELTA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "journal/format.h" /* VR_PAYLOAD_MAX */

/* The unit of everything here, whatever backs the guest's memory. */
#define VR_PAGE_SIZE 4096
#define VR_PAGE_WORDS 512

/* A layout has at most so many blocks, each at most so many pages (16 TiB). */
#define VR_RAM_BLOCKS_MAX 1024
#define VR_RAM_PAGES_MAX (UINT64_C (1) << 32)

#define VR_DELTA_MAGIC UINT32_C (0x70647276) /* "vrdp" */
#define VR_DELTA_VERSION 1

enum {
  VR_DELTA_LZ4 = 1, /* the body is compressed */
  VR_DELTA_FLAGS = 1,
};

struct vr_delta_header {
  uint32_t magic;       /*  0 VR_DELTA_MAGIC */
  uint16_t version;     /*  4 VR_DELTA_VERSION; a reader refuses another */
  uint16_t flags;       /*  6 VR_DELTA_… */
  uint32_t block;       /*  8 index of the RAM block in the layout */
  uint32_t entries;     /* 12 > 0 */
  uint32_t body_size;   /* 16 bytes, decompressed */
  uint32_t stored_size; /* 20 bytes behind this header */
  uint64_t reserved;    /* 24 */
};
_Static_assert (sizeof (struct vr_delta_header) == 32, "delta header size");

#define VR_DELTA_BODY_MAX                                                     \
  (VR_PAYLOAD_MAX - (uint32_t) sizeof (struct vr_delta_header))

enum vr_delta_kind {
  VR_DELTA_ZERO = 1,  /* the pages become zeros */
  VR_DELTA_WHOLE = 2, /* the pages' contents follow */
  VR_DELTA_WORDS = 3, /* changes to one page follow */
};

struct vr_delta_entry {
  uint64_t page;      /*  0 index of the first page in the block */
  uint32_t pages;     /*  8 > 0; WORDS: 1 */
  uint16_t code_size; /* 12 WORDS: > 0; others: 0 */
  uint8_t kind;       /* 14 enum vr_delta_kind */
  uint8_t reserved;   /* 15 */
};
_Static_assert (sizeof (struct vr_delta_entry) == 16, "delta entry size");

/* The longest code the encoder makes; beyond, a whole page is hardly longer
   and is faster to apply. */
#define VR_DELTA_CODE_MAX 3584

/* The sizes of the guest's RAM blocks; a block's id is its place here. */
struct vr_ram_layout {
  uint32_t blocks;       /* <= VR_RAM_BLOCKS_MAX */
  const uint64_t *pages; /* of each block, <= VR_RAM_PAGES_MAX */
};

/* ---- Encode ------------------------------------------------------------- */

enum vr_shadow {
  VR_SHADOW_NONE = 0,
  VR_SHADOW_HASH = 1,
  VR_SHADOW_FULL = 2,
};

struct vr_delta_config {
  enum vr_shadow shadow;
  bool lz4; /* try to compress each payload */

  /* Takes a finished payload; the bytes are valid during the call only.  A
     negative errno stops the encoder, see vr_encoder_pages. */
  int (*emit) (void *opaque, const void *payload, uint32_t size);
  void *opaque;
};

/* Since the encoder was made. */
struct vr_delta_stats {
  uint64_t pages; /* looked at: the sum of the following */
  uint64_t unchanged;
  uint64_t zero;
  uint64_t whole;
  uint64_t words;
  uint64_t payloads;
  uint64_t payload_bytes;
};

struct vr_encoder;

/* Copies the layout.  Memory of a full shadow is only reserved here and taken
   page by page.  -EINVAL: a layout beyond the limits; -ENOMEM.

   One thread at a time may use an encoder. */
int vr_encoder_new (const struct vr_ram_layout *layout,
                    const struct vr_delta_config *config,
                    struct vr_encoder **ret);
void vr_encoder_free (struct vr_encoder *e);

/* Encode `pages` pages of a block, from first_page on, whose contents are at
   data (of any alignment).  The contents must not change during the call: copy
   what a running guest may write.  Payloads are emitted as they fill up.

   -ERANGE: not pages of the layout; nothing was done.  An error of emit is
   returned as it is; the encoder no longer knows what the backup has, and
   returns -ECANCELED until vr_encoder_forget. */
int vr_encoder_pages (struct vr_encoder *e, uint32_t block,
                      uint64_t first_page, uint64_t pages, const void *data);

/* Emit what is not emitted yet, as at the end of an epoch.  Errors as
   above. */
int vr_encoder_flush (struct vr_encoder *e);

/* Drop what is not emitted, and assume nothing about what the backup has:
   each page is sent in full the next time. */
void vr_encoder_forget (struct vr_encoder *e);

void vr_encoder_stats (const struct vr_encoder *e, struct vr_delta_stats *ret);

/* ---- Decode ------------------------------------------------------------- */

/* What a decoder does to an image.  Ranges are inside the block.  An error
   (negative errno) ends the decoding and is returned. */
struct vr_delta_apply {
  int (*write) (void *opaque, uint32_t block, uint64_t offset,
                const void *data, uint32_t length);
  int (*zero) (void *opaque, uint32_t block, uint64_t offset, uint64_t length);
  void *opaque;
};

/* Apply a payload.  Everything is checked before the first callback, so an
   invalid payload changes nothing.  scratch has VR_DELTA_BODY_MAX bytes for
   the decompressed body; it must not overlap the payload.  With apply NULL
   the payload is only checked.

   -EBADMSG: not a valid payload; -EPROTO: of another version or with unknown
   flags; -ERANGE: it names pages that the layout has not; or the callback's
   error. */
int vr_delta_decode (const void *payload, size_t size,
                     const struct vr_ram_layout *layout, void *scratch,
                     const struct vr_delta_apply *apply);

/* The callbacks for an image that is mapped: opaque is an array of the
   addresses of all blocks, uint8_t *[layout->blocks]. */
int vr_delta_write_mapped (void *opaque, uint32_t block, uint64_t offset,
                           const void *data, uint32_t length);
int vr_delta_zero_mapped (void *opaque, uint32_t block, uint64_t offset,
                          uint64_t length);

#endif /* VR_DELTA_H */
