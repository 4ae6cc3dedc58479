/* SPDX-License-Identifier: BSD-3-Clause */
/* What is on disk and on the wire.  man/vmrep-journal.5 says the same for
 * people who do not read C.
 *
 * THE LOG
 *
 * A log is an endless stream of bytes.  A position in it is an LSN.  Primary
 * and backup hold the same bytes at the same LSN; each keeps a window of them
 * in a circular file, the journal.  The stream is cut into segments of
 * segment_size bytes (a power of two); segment number = LSN / segment_size.
 * Numbers start at 1, so that no record has an LSN below segment_size and
 * offset 0 of a log export is free for the status block.
 *
 *   journal file:
 *        0  superblock A                          4096 bytes
 *    65536  superblock B                          4096 bytes
 *   131072  segment slots, segment_count of segment_size bytes;
 *           segment n is in slot n mod segment_count
 *
 *   segment:
 *        0  segment header                         128 bytes
 *      128  records, each a multiple of 64 bytes, up to any point; the rest
 *           of the slot is stale
 *
 * THE CHAIN
 *
 * Every record carries a hash of its own header, seeded with the hash of the
 * record before it.  The first record of a segment is seeded with the
 * segment header's checksum, which covers 16 fresh random bytes (the salt),
 * the LSN and, as prev_chain, the chain value where the segment before ended.
 * So a stale record of a recycled slot never validates, and no segment can be
 * lost, doubled or swapped unnoticed.
 *
 * A record at LSN x is valid if and only if
 *   - its lsn field is x, its kind is known, reserved bits are 0 and its sizes
 *     keep it inside the segment;
 *   - hash == XXH3_64 (bytes 8..63 of the header, seed = chain before it);
 *   - for records with payload, payload_hash == XXH3_64 (payload, seed 0).
 *
 * A segment may end early: if at x in segment n no valid record starts, and
 * segment n+1 has a valid header whose prev_chain is the chain value at x,
 * the log goes on there.  Otherwise x is the end of the log.
 *
 * THE COMMIT POINT
 *
 * The valid superblock with the higher sequence names the last epoch known to
 * be committed, the LSN just behind its seal, and the chain value there.  It
 * may lag behind the truth (it is written with the next sync), never lead it.
 * Recovery walks the chain from applied_lsn: it must arrive at committed_lsn
 * with committed_chain, else committed data is damaged and the journal is
 * refused.  What is valid beyond is the tail; the first invalid record beyond
 * ends it.
 *
 * SYNC BOUNDARY
 *
 * Before a sync the log is padded with a PAD record to a multiple of 4096, so
 * no later write ever touches a block that was promised to be durable, even
 * on a device that turns a block in flight into garbage.
 *
 * All integers are little-endian.  Reserved fields must be 0 when written
 * and are checked when read.
 */
#ifndef VR_FORMAT_H
#define VR_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "epoch.h" /* VR_NAME_SIZE */

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "structures are used as they lie on disk; this needs little-endian"
#endif

#define VR_VERSION 1

#define VR_SUPER_MAGIC "vmrepLOG"
#define VR_SEGMENT_MAGIC "vmrepSEG"
#define VR_STATUS_MAGIC "vmrepSTA"
#define VR_HELLO_MAGIC "vmrepHEL"

#define VR_BLOCK 4096 /* superblock, status, hello, sync boundary */
#define VR_SUPER_A 0
#define VR_SUPER_B 65536
#define VR_DATA_START 131072

#define VR_SEGMENT_HEADER 128
#define VR_RECORD_HEADER 64
#define VR_RECORD_ALIGN 64

#define VR_SEGMENT_MIN 8192
#define VR_SEGMENT_MAX (64U << 20)
#define VR_SEGMENTS_MIN 4
#define VR_SEGMENTS_MAX (1U << 20)

/* The largest payload of one record; a larger guest write becomes several
   records of one epoch.  A record and its neighbours fit one NBD write. */
#define VR_PAYLOAD_MAX (256U << 10)

/* The largest write a shipper sends. */
#define VR_SHIP_MAX (1U << 20)

/* The size a log export claims: more than will ever be written, less than
   2^63. */
#define VR_LSN_MAX (UINT64_C (1) << 62)

/* Epochs and generations stay below, so that sums with them never wrap. */
#define VR_EPOCH_MAX (UINT64_C (1) << 62)

/* ---- Superblock --------------------------------------------------------- */

enum {
  VR_LOG_BACKUP = 1,  /* this copy belongs to a backup */
  VR_LOG_COPYING = 2, /* the image is incomplete: never promote */
  VR_LOG_CLEAN = 4,   /* closed in order; nothing follows the tail */
  VR_LOG_PROMOTED = 8, /* the image was promoted; accepts no more log */
  VR_LOG_FLAGS = 15,
};

struct vr_super {
  char magic[8];            /*   0 VR_SUPER_MAGIC */
  uint32_t version;         /*   8 VR_VERSION; a reader refuses a newer one */
  uint32_t incompat;        /*  12 a reader refuses bits it does not know */
  uint32_t compat;          /*  16 a reader ignores bits it does not know */
  uint32_t flags;           /*  20 VR_LOG_… */
  uint8_t vm_id[16];        /*  24 random, of the VM */
  uint8_t log_id[16];       /*  40 random, of this stream of bytes */
  uint64_t sequence;        /*  56 the higher one is newer */
  uint64_t generation;      /*  64 */
  uint64_t disk_size;       /*  72 bytes; 0 for a memory log */
  uint64_t segment_size;    /*  80 bytes */
  uint64_t segment_count;   /*  88 */
  uint64_t committed_epoch; /*  96 0: none yet */
  uint64_t committed_lsn;   /* 104 */
  uint64_t committed_chain; /* 112 */
  uint64_t applied_epoch;   /* 120 in the base image, durable */
  uint64_t applied_lsn;     /* 128 where redo starts; <= committed_lsn */
  uint64_t applied_chain;   /* 136 */
  uint64_t epoch_limit;     /* 144 no epoch >= this was ever opened */
  uint64_t copied;          /* 152 COPYING: reserved, 0 */
  char vm[VR_NAME_SIZE];    /* 160 */
  char disk[VR_NAME_SIZE];  /* 224 */
  uint8_t reserved[3800];   /* 288 */
  uint64_t checksum;        /* 4088 XXH3_64 of bytes 0..4087, seed 0 */
};
_Static_assert (sizeof (struct vr_super) == VR_BLOCK, "superblock size");

/* ---- Segment header ----------------------------------------------------- */

struct vr_segment {
  char magic[8];        /*   0 VR_SEGMENT_MAGIC */
  uint32_t version;     /*   8 */
  uint32_t reserved0;   /*  12 */
  uint8_t log_id[16];   /*  16 */
  uint64_t lsn;         /*  32 of this header */
  uint64_t prev_chain;  /*  40 chain value where the log came from; 0 in the
                               first segment of a log */
  uint8_t salt[16];     /*  48 fresh random bytes */
  uint8_t reserved[56]; /*  64 */
  uint64_t checksum;    /* 120 XXH3_64 of bytes 0..119, seed 0: the chain
                               seed */
};
_Static_assert (sizeof (struct vr_segment) == VR_SEGMENT_HEADER,
                "segment header size");

/* ---- Record ------------------------------------------------------------- */

enum vr_kind {
  VR_PAD = 1,     /* payload_size meaningless bytes follow */
  VR_WRITE = 2,   /* payload_size == length bytes for [offset, +length) */
  VR_ZERO = 3,    /* [offset, +length) becomes zeros, stays allocated */
  VR_TRIM = 4,    /* [offset, +length) becomes zeros, may be deallocated */
  VR_SEAL = 5,    /* the log now holds all of every epoch <= epoch.
                     offset: CLOCK_REALTIME ns of the cut (information);
                     length: payload bytes since the seal before */
  VR_JOIN = 6,    /* reserved for members joining and leaving, and */
  VR_LEAVE = 7,   /* for the memory log: pages, device state and the */
  VR_PAGES = 8,   /* layout of RAM.  A version 1 reader refuses them. */
  VR_VMSTATE = 9,
  VR_LAYOUT = 10,
};

enum {
  VR_RECORD_COPY = 1, /* part of an initial copy: bytes the primary's image
                         has anyway; only the backup applies it */
  VR_RECORD_FLAGS = 1,
};

struct vr_record {
  uint64_t hash;         /*  0 XXH3_64 of bytes 8..63, seed: chain before */
  uint64_t lsn;          /*  8 of this header */
  uint64_t epoch;        /* 16 never smaller than the record's before */
  uint64_t generation;   /* 24 of the primary that wrote it */
  uint64_t offset;       /* 32 on the disk */
  uint64_t length;       /* 40 on the disk */
  uint64_t payload_hash; /* 48 XXH3_64 of the payload, seed 0; 0 without */
  uint32_t payload_size; /* 56 bytes behind the header, before padding with
                               zeros to VR_RECORD_ALIGN */
  uint16_t kind;         /* 60 enum vr_kind */
  uint16_t flags;        /* 62 VR_RECORD_… */
};
_Static_assert (sizeof (struct vr_record) == VR_RECORD_HEADER,
                "record header size");

/* ---- The log export: status and hello ----------------------------------- */

/* Why a backup refused something; the text is for people. */
enum vr_refusal {
  VR_REFUSED_NOTHING = 0,
  VR_REFUSED_FORMAT = 1,     /* malformed hello, record or write */
  VR_REFUSED_VM = 2,         /* another VM id */
  VR_REFUSED_SIZE = 3,       /* disk size or segment geometry differs */
  VR_REFUSED_WRITER = 4,     /* another writer is connected */
  VR_REFUSED_GENERATION = 5, /* older generation */
  VR_REFUSED_HISTORY = 6,    /* the backup holds another history */
  VR_REFUSED_DAMAGE = 7,     /* the backup's journal is damaged */
  VR_REFUSED_PROMOTED = 8,   /* the backup was promoted */
  VR_REFUSED_IO = 9,         /* the backup's disk failed or is full */
};

/* Read at offset 0 of a log export. */
struct vr_status {
  char magic[8];            /*   0 VR_STATUS_MAGIC */
  uint32_t version;         /*   8 */
  uint32_t flags;           /*  12 VR_LOG_… of the backup's log */
  uint8_t vm_id[16];        /*  16 zeros: nothing here yet */
  uint8_t log_id[16];       /*  32 zeros: no log here yet */
  uint64_t generation;      /*  48 highest seen for this VM */
  uint64_t disk_size;       /*  56 */
  uint64_t segment_size;    /*  64 */
  uint64_t segment_count;   /*  72 */
  uint64_t committed_epoch; /*  80 of the VM */
  uint64_t committed_lsn;   /*  88 of this log */
  uint64_t committed_chain; /*  96 */
  uint64_t next_lsn;        /* 104 end of the contiguous prefix held */
  uint64_t next_chain;      /* 112 chain value there */
  uint64_t applied_epoch;   /* 120 */
  uint64_t applied_lsn;     /* 128 */
  uint64_t session;         /* 136 of the connected writer; 0: none */
  uint64_t sealed_epoch;    /* 144 of this log, durable */
  uint32_t refusal;         /* 152 enum vr_refusal: last on this connection */
  uint32_t members;         /* 156 logs of this VM */
  char vm[VR_NAME_SIZE];    /* 160 */
  char disk[VR_NAME_SIZE];  /* 224 */
  char refusal_text[512];   /* 288 NUL-terminated */
  char waiting_for[VR_NAME_SIZE]; /* 800 a member without which the next epoch
                                     cannot commit; empty: none */
  uint8_t reserved[3224];   /* 864 */
  uint64_t checksum;        /* 4088 as in the superblock */
};
_Static_assert (sizeof (struct vr_status) == VR_BLOCK, "status block size");

enum vr_hello_mode {
  VR_HELLO_CREATE = 1, /* start a log at lsn, which is a segment's start */
  VR_HELLO_RESUME = 2, /* go on at lsn, discarding what is behind it */
  VR_HELLO_COPIED = 3, /* by the connected writer: the initial copy is
                          committed, the image is complete */
};

/* Written at offset 0 of a log export before the first log bytes: who writes,
   and from where.  The writer stays the one writer until it disconnects or
   one of a newer generation comes. */
struct vr_hello {
  char magic[8];           /*   0 VR_HELLO_MAGIC */
  uint32_t version;        /*   8 */
  uint32_t mode;           /*  12 enum vr_hello_mode */
  uint8_t vm_id[16];       /*  16 */
  uint8_t log_id[16];      /*  32 */
  uint64_t generation;     /*  48 */
  uint64_t disk_size;      /*  56 */
  uint64_t segment_size;   /*  64 */
  uint64_t segment_count;  /*  72 */
  uint64_t lsn;            /*  80 */
  uint64_t chain;          /*  88 chain value at lsn; RESUME: must agree */
  uint64_t session;        /*  96 random, not 0 */
  char vm[VR_NAME_SIZE];   /* 104 */
  char disk[VR_NAME_SIZE]; /* 168 */
  char node[VR_NAME_SIZE]; /* 232 who is speaking, for messages */
  uint8_t reserved[3792];  /* 296 */
  uint64_t checksum;       /* 4088 */
};
_Static_assert (sizeof (struct vr_hello) == VR_BLOCK, "hello block size");

/* ---- Functions ---------------------------------------------------------- */

/* Space a record with this payload takes in the log. */
static inline uint64_t
vr_record_size (uint32_t payload_size)
{
  return VR_RECORD_HEADER
         + (((uint64_t) payload_size + VR_RECORD_ALIGN - 1)
            & ~(uint64_t) (VR_RECORD_ALIGN - 1));
}

/* Block checksums: superblock, status and hello share the place of the
   checksum (last 8 bytes of VR_BLOCK).  block_ok also checks the magic. */
void vr_block_seal (void *block);
bool vr_block_ok (const void *block, const char *magic);

/* Superblock: 0, or -EBADMSG (not one, or damaged), -EPROTO (newer or with
   unknown incompatible features), -EUCLEAN (checksum fine, contents
   impossible). */
int vr_super_check (const struct vr_super *s);

/* Fill in the checksum / check everything that needs no context. */
void vr_segment_seal (struct vr_segment *s);
bool vr_segment_ok (const struct vr_segment *s, const uint8_t log_id[16],
                    uint64_t lsn);

/* Hash of a payload. */
uint64_t vr_payload_hash (const void *payload, size_t n);

/* The chain value behind record *r, given the one before; store it in
   r->hash to write the record, compare it to r->hash to check it. */
uint64_t vr_record_chain (const struct vr_record *r, uint64_t chain);

/* Is the header possible at lsn, in a segment ending at segment_end, on a
   disk of disk_size bytes?  Checks all fields but hashes.  NULL if it is,
   else what is wrong. */
const char *vr_record_problem (const struct vr_record *r, uint64_t lsn,
                               uint64_t segment_end, uint64_t disk_size);

/* Names of VMs, disks and nodes: 1..63 of letters, digits, '.', '_', '-',
   not starting with '.' or '-'.  They become file names and export names. */
bool vr_name_ok (const char *name);

/* "write", "seal", …; "?" for an unknown kind. */
const char *vr_kind_name (unsigned kind);

#endif /* VR_FORMAT_H */
