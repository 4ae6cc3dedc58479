/* SPDX-License-Identifier: BSD-3-Clause */
/* See rounds.h. */
#include "rounds.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image.h"
#include "output.h"

#define DISTANCE_MIN 4
#define DISTANCE_MAX 1024

/* A server that gives a view up before it is ready has a full journal: how
   often to try again, and how long to let it drain. */
#define GIVEN_UP_MAX 50
#define GIVEN_UP_PAUSE_US 200000

/* A server waits 30 s for an epoch before it says no. */
#define SERVER_WAITS_MS 30000
#define OPEN_MS 40000

/* One request may mean 16 MiB from a slow disk. */
#define READ_MS 60000

/* Hashes per request, and requests at a time: 8 MiB of disk each, so that
   several of a server's threads have work. */
#define REQUEST_BYTES (32 * VR_HASH_SIZE)

static int
fail (struct round *r, int err, const char *who, const char *why)
{
  snprintf (r->error, sizeof r->error, "%s: %s", who, why);
  return err;
}

/* Both at once; whoever has an error text is to blame. */
static int
wait_both (struct round *r, struct client *c, int timeout_ms)
{
  struct client *both[SIDES] = { &c[PRIMARY], &c[BACKUP] };
  int err;

  c[PRIMARY].error[0] = c[BACKUP].error[0] = 0;
  err = client_wait (both, SIDES, timeout_ms);
  if (err < 0) {
    int who = c[PRIMARY].error[0] ? PRIMARY : BACKUP;

    return fail (r, err, r->uri[who], c[who].error);
  }
  return 0;
}

/* ---- The backup's log --------------------------------------------------- */

static int
read_status (struct round *r)
{
  int err = client_read_status (&r->log, &r->status);

  return err < 0 ? fail (r, err, r->uri[BACKUP], r->log.error) : 0;
}

/* Will there ever be an epoch that both have? */
static int
check_status (struct round *r)
{
  static const uint8_t none[16];
  const struct vr_status *s = &r->status;
  const char *why = NULL;

  if (s->refusal)
    why = s->refusal_text;
  else if (memcmp (s->log_id, none, sizeof none) == 0)
    why = "nothing was ever replicated here";
  else if (s->flags & VR_LOG_COPYING)
    why = "its first copy is not finished";
  else if (s->flags & VR_LOG_PROMOTED)
    why = "it was promoted, and is a copy of nothing any more";
  else if (s->session == 0)
    why = "no primary is connected to it, so no epoch is to come";
  return why ? fail (r, -ENOENT, r->uri[BACKUP], why) : 0;
}

static int
take_export_name (struct round *r)
{
  char *name = must (client_export (&r->log));
  const char *slash = strchr (name, '/');
  bool ok = slash && !strchr (slash + 1, '/') && !strchr (name, '@')
            && strlen (name) < sizeof r->log_export;

  if (ok)
    strcpy (r->log_export, name);
  free (name);
  return ok ? 0
            : fail (r, -EINVAL, r->uri[BACKUP],
                    "must name a log export, as nbd://HOST/VM/DISK does");
}

static void
look_for_view (void *opaque, const char *name)
{
  if (strcmp (name, "@committed") == 0)
    *(bool *) opaque = true;
}

/* A server that takes any name for an export would only confuse us later. */
static int
check_primary (struct round *r)
{
  struct client c;
  bool found = false;
  int err = client_connect (&c, r->uri[PRIMARY]);

  if (err == 0)
    err = client_list (&c, look_for_view, &found);
  if (err < 0)
    fail (r, err, r->uri[PRIMARY], c.error);
  else if (!found)
    err = fail (r, -EINVAL, r->uri[PRIMARY],
                "is no nbdkit vmrep: it has no export @committed");
  client_close (&c);
  return err;
}

int
round_start (struct round *r, const char *primary_uri,
             const char *backup_uri)
{
  int err;

  *r = (struct round){ .uri = { primary_uri, backup_uri },
                       .distance = DISTANCE_MIN };
  err = client_connect (&r->log, backup_uri);
  if (err < 0)
    return fail (r, err, backup_uri, r->log.error);
  err = take_export_name (r);
  if (err < 0)
    return err;
  err = client_go (&r->log, r->log_export);
  if (err < 0)
    return fail (r, err, backup_uri, r->log.error);
  err = read_status (r);
  if (err == 0)
    err = check_status (r);
  return err < 0 ? err : check_primary (r);
}

void
round_end (struct round *r)
{
  client_close (&r->log);
}

/* ---- A pair of views ---------------------------------------------------- */

/* Ask both for the view of r->epoch, and wait for both answers. */
static int
go_both (struct round *r, struct client *c, const char *suffix)
{
  char export[2 * VR_NAME_SIZE + 32];
  int err;

  snprintf (export, sizeof export, "@%llu%s", (unsigned long long) r->epoch,
            suffix);
  err = client_begin_go (&c[PRIMARY], export);
  if (err < 0)
    return fail (r, err, r->uri[PRIMARY], c[PRIMARY].error);
  snprintf (export, sizeof export, "%s@%llu%s", r->log_export,
            (unsigned long long) r->epoch, suffix);
  err = client_begin_go (&c[BACKUP], export);
  if (err < 0)
    return fail (r, err, r->uri[BACKUP], c[BACKUP].error);
  return wait_both (r, c, OPEN_MS);
}

static int
connect_both (struct round *r, struct client *c)
{
  for (int i = 0; i < SIDES; i++) {
    int err = client_connect (&c[i], r->uri[i]);

    if (err < 0)
      return fail (r, err, r->uri[i], c[i].error);
  }
  return 0;
}

static void
close_both (struct client *c)
{
  for (int i = 0; i < SIDES; i++)
    if (c[i].nbd)
      client_close (&c[i]);
}

/* Do both show the same disk? */
static int
check_sizes (struct round *r)
{
  uint64_t size = r->status.disk_size;
  uint64_t hashes
      = (size + VR_HASH_CHUNK - 1) / VR_HASH_CHUNK * VR_HASH_SIZE;

  for (int i = 0; i < SIDES; i++) {
    char why[160];

    if (client_size (&r->hashes[i]) == (int64_t) hashes)
      continue;
    snprintf (why, sizeof why,
              "its export of hashes has %lld bytes and not %llu: this is no "
              "nbdkit vmrep, or a disk of another size",
              (long long) client_size (&r->hashes[i]),
              (unsigned long long) hashes);
    return fail (r, -EINVAL, r->uri[i], why);
  }
  return 0;
}

/* Somebody said no, and NBD does not tell why.
 *   -EAGAIN   the epoch had passed: choose a later one
 *   -ESTALE   the view was given up before the epoch came, most likely
 * else it makes no sense to go on. */
static int
explain_refusal (struct round *r, uint64_t asked_ns)
{
  uint64_t waited_ms = (vr_now_ns (vr_io_real ()) - asked_ns) / 1000000;
  int who = client_is_open (&r->hashes[PRIMARY]) ? BACKUP : PRIMARY;
  int err = read_status (r);

  if (err == 0)
    err = check_status (r);
  if (err < 0)
    return err;
  if (r->status.committed_epoch > r->epoch)
    return -EAGAIN;
  if (waited_ms < SERVER_WAITS_MS)
    return fail (r, -ESTALE, r->uri[who],
                 "its journal is too full to show the disk at one epoch: too "
                 "small for what is being written");
  return fail (r, -ETIMEDOUT, r->uri[who],
               "no epoch was committed for 30 s; see vmrep status");
}

static int
try_to_open (struct round *r)
{
  uint64_t asked_ns;
  int err = connect_both (r, r->hashes);

  if (err == 0)
    err = read_status (r);
  if (err == 0)
    err = check_status (r);
  if (err < 0)
    return err;
  r->epoch = r->status.committed_epoch + r->distance;
  asked_ns = vr_now_ns (vr_io_real ());
  err = go_both (r, r->hashes, ".xxh3");
  if (err < 0)
    return err;
  if (!client_is_open (&r->hashes[PRIMARY])
      || !client_is_open (&r->hashes[BACKUP]))
    return explain_refusal (r, asked_ns);
  return check_sizes (r);
}

int
round_open (struct round *r)
{
  unsigned given_up = 0;
  int err;

  for (;;) {
    err = try_to_open (r);
    if (err == 0)
      return 0;
    round_close (r);
    if (err == -ESTALE && ++given_up < GIVEN_UP_MAX) {
      usleep (GIVEN_UP_PAUSE_US);
      continue;
    }
    if (err != -EAGAIN)
      return err;
    if (r->distance >= DISTANCE_MAX)
      break;
    r->distance *= 2;
  }
  return fail (r, -ESTALE, r->uri[BACKUP],
               "epochs pass faster than views of them can be opened");
}

void
round_close (struct round *r)
{
  close_both (r->bytes);
  close_both (r->hashes);
}

/* ---- Reading ------------------------------------------------------------ */

static int
finish_reads (struct round *r, struct client *c)
{
  int err = wait_both (r, c, READ_MS);

  for (int i = 0; i < SIDES && err == 0; i++)
    if (c[i].failed)
      err = fail (r, -EIO, r->uri[i], strerror (c[i].failed));
  return err;
}

static int
begin_read (struct round *r, struct client *c, int side, uint8_t *buf,
            size_t n, uint64_t offset)
{
  int err = client_begin_read (&c[side], buf, n, offset);

  return err < 0 ? fail (r, err, r->uri[side], c[side].error) : 0;
}

int
round_read_hashes (struct round *r, uint8_t *buf[SIDES], size_t n,
                   uint64_t offset)
{
  int err = 0;

  r->hashes[PRIMARY].failed = r->hashes[BACKUP].failed = 0;
  for (size_t at = 0; at < n && err == 0; at += REQUEST_BYTES) {
    size_t part = n - at < REQUEST_BYTES ? n - at : REQUEST_BYTES;

    for (int i = 0; i < SIDES && err == 0; i++)
      err = begin_read (r, r->hashes, i, buf[i] + at, part, offset + at);
  }
  return err < 0 ? err : finish_reads (r, r->hashes);
}

/* The view of hashes holds the epoch, so it is still to be had. */
static int
open_bytes (struct round *r)
{
  int err;

  if (r->bytes[PRIMARY].nbd)
    return 0;
  err = connect_both (r, r->bytes);
  if (err == 0)
    err = go_both (r, r->bytes, "");
  if (err == 0
      && (!client_is_open (&r->bytes[PRIMARY])
          || !client_is_open (&r->bytes[BACKUP])))
    err = fail (r, -ESTALE, r->uri[BACKUP], "the view was given up");
  if (err < 0)
    close_both (r->bytes);
  return err;
}

int
round_first_difference (struct round *r, uint64_t offset, size_t n,
                        uint64_t *ret)
{
  static uint8_t buf[SIDES][VR_HASH_CHUNK];
  int err = open_bytes (r);

  for (int i = 0; i < SIDES && err == 0; i++) {
    r->bytes[i].failed = 0;
    err = begin_read (r, r->bytes, i, buf[i], n, offset);
  }
  if (err == 0)
    err = finish_reads (r, r->bytes);
  if (err < 0)
    return err;
  for (size_t i = 0; i < n; i++)
    if (buf[PRIMARY][i] != buf[BACKUP][i]) {
      *ret = offset + i;
      return 0;
    }
  return -ENOENT;
}
