/* SPDX-License-Identifier: BSD-3-Clause */
/* Sends a backup what no primary would send.
 *
 *   bad-log URI
 *
 * Each case is a VM of its own: after a hello, one bad thing, which must be
 * refused with the errno and the reason expected, in the reply and in the
 * status block; then the good version of it, which must be taken, so the bad
 * one has changed nothing.  Prints the cases; exit status 1 at the first that
 * goes wrong.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <libnbd.h>

#include "format.h"

enum { SEGMENT = 65536, SEGMENTS = 16, DISK_SIZE = 1 << 20, DATA = 4096 };

static const char *uri;
static const char *case_name = "?";
static unsigned case_number;

static void __attribute__ ((noreturn, format (printf, 1, 2)))
fail (const char *fmt, ...)
{
  va_list args;

  printf ("%s: ", case_name);
  va_start (args, fmt);
  vprintf (fmt, args);
  va_end (args);
  printf (" (%s)\n", nbd_get_error () ? nbd_get_error () : "no NBD error");
  exit (1);
}

static char vm[VR_NAME_SIZE];

static void
begin_case (const char *name)
{
  case_name = name;
  snprintf (vm, sizeof vm, "bad%u", case_number++);
}

/* ---- Talking ------------------------------------------------------------ */

static struct nbd_handle *
connect_log (void)
{
  struct nbd_handle *nbd = nbd_create ();
  char export[2 * VR_NAME_SIZE];

  snprintf (export, sizeof export, "%s/disk0", vm);
  if (nbd == NULL || nbd_set_opt_mode (nbd, true) < 0
      || nbd_set_strict_mode (nbd, 0) < 0 || nbd_connect_uri (nbd, uri) < 0
      || nbd_set_export_name (nbd, export) < 0 || nbd_opt_go (nbd) < 0)
    fail ("cannot connect");
  return nbd;
}

static struct vr_status
status_of (struct nbd_handle *nbd)
{
  struct vr_status st;

  if (nbd_pread (nbd, &st, sizeof st, 0, 0) < 0)
    fail ("cannot read the status");
  if (!vr_block_ok (&st, VR_STATUS_MAGIC))
    fail ("the status is damaged");
  return st;
}

/* This write must fail, with this errno, for this reason. */
static void
refused (struct nbd_handle *nbd, const void *buf, size_t n, uint64_t offset,
         int want_errno, enum vr_refusal want, const char *text)
{
  struct vr_status st;
  int got;

  if (nbd_pwrite (nbd, buf, n, offset, 0) == 0)
    fail ("was accepted");
  got = nbd_get_errno ();
  if (got != want_errno)
    fail ("errno %d, expected %d", got, want_errno);
  st = status_of (nbd);
  if (st.refusal != (uint32_t) want)
    fail ("reason %u, expected %u: %s", st.refusal, want, st.refusal_text);
  if (strstr (st.refusal_text, text) == NULL)
    fail ("says '%s', not '%s'", st.refusal_text, text);
  printf ("%-40s %s\n", case_name, st.refusal_text);
}

/* ---- A good hello and a good log ---------------------------------------- */

static struct vr_hello
good_hello (void)
{
  struct vr_hello h = { .version = VR_VERSION, .mode = VR_HELLO_CREATE,
                        .vm_id = { 1, 2, 3 }, .log_id = { 4, 5, 6 },
                        .generation = 2, .disk_size = DISK_SIZE,
                        .segment_size = SEGMENT, .segment_count = SEGMENTS,
                        .lsn = SEGMENT, .session = 7, .disk = "disk0",
                        .node = "test" };

  memcpy (h.magic, VR_HELLO_MAGIC, 8);
  snprintf (h.vm, sizeof h.vm, "%s", vm);
  return h;
}

static void
send_hello (struct nbd_handle *nbd)
{
  struct vr_hello h = good_hello ();

  vr_block_seal (&h);
  if (nbd_pwrite (nbd, &h, sizeof h, 0, 0) < 0)
    fail ("a good hello was refused");
}

/* Segment header, one write, one seal with its padding. */
struct log {
  struct vr_segment segment;
  struct vr_record write;
  uint8_t data[DATA];
  struct vr_record seal;
  struct vr_record pad;
  uint8_t padding[2 * VR_BLOCK - VR_SEGMENT_HEADER - 3 * VR_RECORD_HEADER
                  - DATA];
};
_Static_assert (sizeof (struct log) == 2 * VR_BLOCK, "two blocks");

static void
chain_record (struct vr_record *r, uint64_t *chain)
{
  r->hash = vr_record_chain (r, *chain);
  *chain = r->hash;
}

/* After a change of some field: hashes that agree with it. */
static void
seal_log (struct log *l)
{
  uint64_t chain;

  vr_segment_seal (&l->segment);
  chain = l->segment.checksum;
  chain_record (&l->write, &chain);
  chain_record (&l->seal, &chain);
  chain_record (&l->pad, &chain);
}

static struct log
good_log (void)
{
  const uint64_t at = SEGMENT;
  struct log l = { .segment = { .version = VR_VERSION, .lsn = at } };

  memcpy (l.segment.magic, VR_SEGMENT_MAGIC, 8);
  l.segment.log_id[0] = 4;
  l.segment.log_id[1] = 5;
  l.segment.log_id[2] = 6;
  memset (l.data, 0x5a, DATA);
  l.write = (struct vr_record){ .lsn = at + offsetof (struct log, write),
                                .epoch = 10, .generation = 2, .offset = 8192,
                                .length = DATA,
                                .payload_hash = vr_payload_hash (l.data,
                                                                 DATA),
                                .payload_size = DATA, .kind = VR_WRITE };
  l.seal = (struct vr_record){ .lsn = at + offsetof (struct log, seal),
                               .epoch = 10, .generation = 2,
                               .kind = VR_SEAL };
  l.pad = (struct vr_record){ .lsn = at + offsetof (struct log, pad),
                              .epoch = 10, .generation = 2,
                              .payload_size = sizeof l.padding,
                              .kind = VR_PAD };
  seal_log (&l);
  return l;
}

/* The good log must be taken still, and commit. */
static void
takes_good_log (struct nbd_handle *nbd)
{
  struct log l = good_log ();
  struct vr_status st;

  if (nbd_pwrite (nbd, &l, sizeof l, SEGMENT, LIBNBD_CMD_FLAG_FUA) < 0)
    fail ("afterwards a good log was refused");
  st = status_of (nbd);
  if (st.committed_epoch != 10 || st.next_lsn != SEGMENT + sizeof l)
    fail ("afterwards a good log was not committed");
}

/* ---- Cases: hello ------------------------------------------------------- */

struct hello_case {
  const char *name;
  void (*spoil) (struct vr_hello *);
  enum vr_refusal reason;
  int error;
  bool keep_checksum; /* spoiled after it was made */
};

static void spoil_checksum (struct vr_hello *h) { h->generation++; }
static void spoil_magic (struct vr_hello *h) { h->magic[0] = 'x'; }
static void spoil_version (struct vr_hello *h) { h->version++; }
static void spoil_reserved (struct vr_hello *h) { h->reserved[100] = 1; }
static void spoil_mode (struct vr_hello *h) { h->mode = 77; }
static void spoil_resume (struct vr_hello *h) { h->mode = VR_HELLO_RESUME; }
static void spoil_vm (struct vr_hello *h) { h->vm[0] = 'x'; }
static void spoil_path (struct vr_hello *h) { strcpy (h->disk, "../x"); }
static void spoil_name (struct vr_hello *h)
{
  memset (h->disk, 'a', sizeof h->disk);
}
static void spoil_node (struct vr_hello *h)
{
  memset (h->node, 'a', sizeof h->node);
}
static void spoil_session (struct vr_hello *h) { h->session = 0; }
static void spoil_size (struct vr_hello *h) { h->disk_size = 0; }
static void spoil_huge (struct vr_hello *h) { h->disk_size = UINT64_MAX; }
static void spoil_lsn (struct vr_hello *h) { h->lsn = SEGMENT + 64; }
static void spoil_lsn0 (struct vr_hello *h) { h->lsn = 0; }
static void spoil_far (struct vr_hello *h) { h->lsn = UINT64_MAX - 65535; }
static void spoil_segment0 (struct vr_hello *h) { h->segment_size = 0; }
static void spoil_segment3 (struct vr_hello *h)
{
  h->segment_size = 3 * 65536;
  h->lsn = h->segment_size;
}
static void spoil_segment_huge (struct vr_hello *h)
{
  h->segment_size = UINT64_C (1) << 40;
  h->lsn = h->segment_size;
}
static void spoil_count0 (struct vr_hello *h) { h->segment_count = 0; }
static void spoil_count (struct vr_hello *h)
{
  h->segment_count = UINT64_C (1) << 48;
}

static const struct hello_case hello_cases[] = {
  { "hello: wrong checksum", spoil_checksum, VR_REFUSED_FORMAT, EINVAL,
    true },
  { "hello: wrong magic", spoil_magic, VR_REFUSED_FORMAT, EINVAL, true },
  { "hello: newer version", spoil_version, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: reserved field", spoil_reserved, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: unknown mode", spoil_mode, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: resume of nothing", spoil_resume, VR_REFUSED_HISTORY, EPERM,
    false },
  { "hello: of another VM", spoil_vm, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: a path as a name", spoil_path, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: name without an end", spoil_name, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: node without an end", spoil_node, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: no session", spoil_session, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: empty disk", spoil_size, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: disk of 2^64-1 bytes", spoil_huge, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: within a segment", spoil_lsn, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: LSN 0", spoil_lsn0, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: LSN near 2^64", spoil_far, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: segments of 0 bytes", spoil_segment0, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: segments of 192 KiB", spoil_segment3, VR_REFUSED_FORMAT, EINVAL,
    false },
  { "hello: segments of 1 TiB", spoil_segment_huge, VR_REFUSED_FORMAT,
    EINVAL, false },
  { "hello: no segments", spoil_count0, VR_REFUSED_FORMAT, EINVAL, false },
  { "hello: 2^48 segments", spoil_count, VR_REFUSED_FORMAT, EINVAL, false },
};

static void
try_hello (const struct hello_case *c)
{
  struct nbd_handle *nbd;
  struct vr_hello h;

  begin_case (c->name);
  nbd = connect_log ();
  h = good_hello ();
  if (!c->keep_checksum)
    c->spoil (&h);
  vr_block_seal (&h);
  if (c->keep_checksum)
    c->spoil (&h);
  refused (nbd, &h, sizeof h, 0, c->error, c->reason, "");
  send_hello (nbd);
  takes_good_log (nbd);
  nbd_close (nbd);
}

/* ---- Cases: log bytes --------------------------------------------------- */

struct log_case {
  const char *name;
  void (*spoil) (struct log *);
  const char *text;
  bool keep_hashes;
};

static void bad_header (struct log *l) { l->segment.salt[3]++; }
static void bad_prev (struct log *l) { l->segment.prev_chain = 5; }
static void bad_log_id (struct log *l) { l->segment.log_id[5] = 1; }
static void bad_hash (struct log *l) { l->write.hash++; }
static void bad_payload (struct log *l) { l->data[1000]++; }
static void bad_lsn (struct log *l) { l->write.lsn += 64; }
static void bad_kind (struct log *l) { l->write.kind = 99; }
static void bad_kind0 (struct log *l) { l->write.kind = 0; }
static void bad_memory (struct log *l) { l->write.kind = VR_PAGES; }
static void bad_flags (struct log *l) { l->write.flags = 0x8000; }
static void bad_range (struct log *l)
{
  l->write.offset = DISK_SIZE - DATA + 1;
}
static void bad_wrap (struct log *l) { l->write.offset = UINT64_MAX - 100; }
static void bad_length (struct log *l) { l->write.length = DATA - 1; }
static void bad_size (struct log *l) { l->write.payload_size = UINT32_MAX; }
static void bad_size_end (struct log *l) { l->write.payload_size = 65000; }
static void bad_generation (struct log *l) { l->write.generation = 3; }
static void bad_epoch (struct log *l) { l->seal.epoch = 9; }
static void bad_epoch0 (struct log *l) { l->write.epoch = 0; }
static void bad_epoch_max (struct log *l) { l->write.epoch = UINT64_MAX; }
static void bad_pad (struct log *l)
{
  l->pad.kind = VR_ZERO;
  l->pad.epoch = 11;
  l->pad.length = 100;
  l->pad.payload_size = 0;
}

static const struct log_case log_cases[] = {
  { "log: segment header damaged", bad_header, "segment header", true },
  { "log: segment follows another", bad_prev, "follow", false },
  { "log: segment of another log", bad_log_id, "segment header", false },
  { "log: record hash", bad_hash, "follow", true },
  { "log: payload damaged", bad_payload, "payload", true },
  { "log: record of another place", bad_lsn, "", false },
  { "log: unknown kind", bad_kind, "", false },
  { "log: kind 0", bad_kind0, "", false },
  { "log: memory pages", bad_memory, "", false },
  { "log: unknown flags", bad_flags, "", false },
  { "log: write past the disk's end", bad_range, "", false },
  { "log: write that wraps around", bad_wrap, "", false },
  { "log: length and payload differ", bad_length, "", false },
  { "log: payload of 4 GiB", bad_size, "", false },
  { "log: payload past the segment", bad_size_end, "", false },
  { "log: of a newer generation", bad_generation, "generation", false },
  { "log: epoch goes back", bad_epoch, "", false },
  { "log: epoch 0", bad_epoch0, "", false },
  { "log: epoch 2^64-1", bad_epoch_max, "epoch", false },
  { "log: seal without padding", bad_pad, "padded", false },
};

static void
try_log (const struct log_case *c)
{
  struct nbd_handle *nbd;
  struct log l = good_log ();

  begin_case (c->name);
  nbd = connect_log ();
  send_hello (nbd);
  c->spoil (&l);
  if (!c->keep_hashes)
    seal_log (&l);
  refused (nbd, &l, sizeof l, SEGMENT, EINVAL, VR_REFUSED_FORMAT, c->text);
  takes_good_log (nbd);
  nbd_close (nbd);
}

/* ---- Cases: a log that is there, and its writer ------------------------- */

/* What a second primary could say, changed in one field. */
struct writer_case {
  const char *name;
  void (*spoil) (struct vr_hello *);
  enum vr_refusal reason;
  int error;
};

static void writer_other (struct vr_hello *h) { h->session = 8; }
static void writer_old (struct vr_hello *h) { h->generation = 1; }
static void writer_vm (struct vr_hello *h) { h->vm_id[0]++; }
static void writer_log (struct vr_hello *h)
{
  h->log_id[0]++;
  h->generation = 3;
}
static void writer_size (struct vr_hello *h)
{
  h->disk_size += 512;
  h->generation = 3;
}
static void writer_chain (struct vr_hello *h)
{
  h->chain++;
  h->generation = 3;
}
static void writer_ahead (struct vr_hello *h)
{
  h->lsn += 4096;
  h->generation = 3;
}
static void writer_behind (struct vr_hello *h)
{
  h->lsn = SEGMENT + VR_SEGMENT_HEADER;
  h->generation = 3;
}

static const struct writer_case writer_cases[] = {
  { "writer: a second one", writer_other, VR_REFUSED_WRITER, EPERM },
  { "writer: older generation", writer_old, VR_REFUSED_GENERATION,
    ESHUTDOWN },
  { "writer: another VM of this name", writer_vm, VR_REFUSED_VM, EPERM },
  { "writer: another journal", writer_log, VR_REFUSED_HISTORY, EPERM },
  { "writer: another size", writer_size, VR_REFUSED_SIZE, EINVAL },
  { "writer: another history", writer_chain, VR_REFUSED_HISTORY, EPERM },
  { "writer: beyond the log", writer_ahead, VR_REFUSED_HISTORY, EPERM },
  { "writer: before what is committed", writer_behind, VR_REFUSED_HISTORY,
    EPERM },
};

/* The first writer has committed something and must not notice. */
static void
try_writers (void)
{
  struct nbd_handle *first, *second;
  struct vr_status before, after;
  struct vr_hello h;

  begin_case ("writer: the first one");
  first = connect_log ();
  send_hello (first);
  takes_good_log (first);
  before = status_of (first);
  for (size_t i = 0; i < sizeof writer_cases / sizeof writer_cases[0]; i++) {
    case_name = writer_cases[i].name;
    second = connect_log ();
    h = good_hello ();
    h.mode = VR_HELLO_RESUME;
    h.session = 9;
    h.lsn = before.next_lsn;
    h.chain = before.next_chain;
    writer_cases[i].spoil (&h);
    vr_block_seal (&h);
    refused (second, &h, sizeof h, 0, writer_cases[i].error,
             writer_cases[i].reason, "");
    nbd_close (second);
  }
  after = status_of (first);
  if (after.session != before.session || after.next_lsn != before.next_lsn
      || after.generation != before.generation)
    fail ("something was changed");
  nbd_close (first);
}

/* ---- Cases: requests ---------------------------------------------------- */

static void
try_lengths (void)
{
  static const size_t odd[] = { 1, 63, 127, 129, 191, 4097,
                                sizeof (struct log) - 1 };
  struct nbd_handle *nbd;
  struct log l = good_log ();
  char *big = calloc (1, 2 << 20);

  begin_case ("request: log before a hello");
  nbd = connect_log ();
  refused (nbd, &l, sizeof l, SEGMENT, EINVAL, VR_REFUSED_FORMAT, "hello");
  case_name = "request: hello cut short";
  refused (nbd, &l, 512, 0, EINVAL, VR_REFUSED_FORMAT, "hello");
  case_name = "request: hello too long";
  refused (nbd, &l, sizeof l, 0, EINVAL, VR_REFUSED_FORMAT, "hello");
  send_hello (nbd);
  case_name = "request: records cut short";
  for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++)
    refused (nbd, &l, odd[i], SEGMENT, EINVAL, VR_REFUSED_FORMAT, "");
  case_name = "request: 2 MiB at once";
  refused (nbd, big, 2 << 20, SEGMENT, EINVAL, VR_REFUSED_FORMAT, "2097152");
  case_name = "request: zeros";
  refused (nbd, big, 1 << 20, SEGMENT, EINVAL, VR_REFUSED_FORMAT, "");
  takes_good_log (nbd);
  case_name = "request: behind the log's end";
  refused (nbd, &l, sizeof l, SEGMENT, EINVAL, VR_REFUSED_FORMAT, "behind");
  case_name = "request: read of the log";
  if (nbd_pread (nbd, big, 4096, SEGMENT, 0) == 0
      || nbd_get_errno () != EINVAL)
    fail ("not refused");
  if (nbd_pread (nbd, big, 4097, 0, 0) == 0)
    fail ("not refused");
  case_name = "request: trim and zero";
  if (nbd_trim (nbd, 4096, SEGMENT, 0) == 0
      || nbd_zero (nbd, 4096, SEGMENT, 0) == 0)
    fail ("not refused");
  nbd_close (nbd);
  free (big);
}

/* Bytes that never get their turn, from a client that then is gone: nobody
   may wait for them. */
static void
try_gap (void)
{
  struct nbd_handle *nbd;
  struct log l = good_log ();
  int64_t cookie;

  begin_case ("request: beyond a gap");
  nbd = connect_log ();
  send_hello (nbd);
  for (unsigned i = 0; i < 10; i++) {
    cookie = nbd_aio_pwrite (nbd, &l, sizeof l,
                             (2 + i) * (uint64_t) SEGMENT,
                             NBD_NULL_COMPLETION, 0);
    if (cookie < 0)
      fail ("cannot send");
  }
  for (unsigned i = 0; i < 20; i++)
    nbd_poll (nbd, 10);
  if (nbd_aio_in_flight (nbd) != 10)
    fail ("answered");
  nbd_close (nbd);
  nbd = connect_log ();
  for (unsigned i = 0;; i++) {
    struct vr_hello h = good_hello ();

    h.session = 8;
    vr_block_seal (&h);
    if (nbd_pwrite (nbd, &h, sizeof h, 0, 0) == 0)
      break;
    if (i == 300)
      fail ("the old writer is not forgotten");
    usleep (10000);
  }
  takes_good_log (nbd);
  printf ("%s\n", case_name);
  nbd_close (nbd);
}

int
main (int argc, char *argv[])
{
  if (argc != 2) {
    fprintf (stderr, "usage: bad-log URI\n");
    return 2;
  }
  uri = argv[1];
  setvbuf (stdout, NULL, _IOLBF, 0);
  for (size_t i = 0; i < sizeof hello_cases / sizeof hello_cases[0]; i++)
    try_hello (&hello_cases[i]);
  for (size_t i = 0; i < sizeof log_cases / sizeof log_cases[0]; i++)
    try_log (&log_cases[i]);
  try_writers ();
  try_lengths ();
  try_gap ();
  return 0;
}
