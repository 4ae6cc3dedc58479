/* SPDX-License-Identifier: BSD-3-Clause */
/* See client.h. */
#include "client.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libnbd.h>

#define CLIENTS_MAX 4

static int
client_error (struct client *c, const char *what)
{
  int err = nbd_get_errno ();
  const char *why = nbd_get_error ();

  snprintf (c->error, sizeof c->error, "%s: %s", what,
            why ? why : "unknown error");
  return err ? -err : -EIO;
}

static int64_t
now_ms (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (int64_t) t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ---- Working several at once -------------------------------------------- */

/* Answers to options and to commands arrive here. */
static int
on_answer (void *opaque, int *error)
{
  struct client *c = opaque;

  c->pending--;
  if (*error)
    c->failed = *error;
  return 1;
}

static nbd_completion_callback
answer_to (struct client *c)
{
  c->pending++;
  return (nbd_completion_callback){ .callback = on_answer, .user_data = c };
}

static bool
is_connecting (const struct client *c)
{
  return nbd_aio_is_created (c->nbd) > 0 || nbd_aio_is_connecting (c->nbd) > 0;
}

bool
client_settled (const struct client *c)
{
  return c->pending == 0 && !is_connecting (c);
}

/* Only Unix and TCP sockets: a hang-up is told by the next read. */
static int
work (struct client *c, short revents)
{
  unsigned dir = nbd_aio_get_direction (c->nbd);
  int r = 0;

  if ((dir & LIBNBD_AIO_DIRECTION_READ) && (revents & (POLLIN | POLLHUP)))
    r = nbd_aio_notify_read (c->nbd);
  else if ((dir & LIBNBD_AIO_DIRECTION_WRITE)
           && (revents & (POLLOUT | POLLHUP | POLLERR)))
    r = nbd_aio_notify_write (c->nbd);
  else if (revents & (POLLERR | POLLNVAL)) {
    snprintf (c->error, sizeof c->error, "connection lost");
    return -ECONNRESET;
  }
  if (r < 0 || nbd_aio_is_dead (c->nbd) > 0 || nbd_aio_is_closed (c->nbd) > 0)
    return client_error (c, "connection");
  return 0;
}

static short
poll_events (struct client *c)
{
  unsigned dir = nbd_aio_get_direction (c->nbd);

  return (short) ((dir & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0)
                  | (dir & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0));
}

static int
step (struct client *const *c, size_t n, int timeout_ms)
{
  struct pollfd fds[CLIENTS_MAX];
  int err = 0;

  for (size_t i = 0; i < n; i++)
    fds[i] = (struct pollfd){ .fd = nbd_aio_get_fd (c[i]->nbd),
                              .events = poll_events (c[i]) };
  if (poll (fds, (nfds_t) n, timeout_ms) < 0)
    return errno == EINTR ? 0 : -errno;
  for (size_t i = 0; i < n && err == 0; i++)
    if (fds[i].revents)
      err = work (c[i], fds[i].revents);
  return err;
}

int
client_wait (struct client *const *c, size_t n, int timeout_ms)
{
  int64_t end = now_ms () + timeout_ms;

  for (;;) {
    int64_t left = end - now_ms ();
    size_t busy = 0;
    int err;

    while (busy < n && client_settled (c[busy]))
      busy++;
    if (busy == n)
      return 0;
    if (left <= 0) {
      snprintf (c[busy]->error, sizeof c[busy]->error, "no answer for %d s",
                timeout_ms / 1000);
      return -ETIMEDOUT;
    }
    err = step (c, n, (int) left);
    if (err < 0)
      return err;
  }
}

/* ---- Connect and choose ------------------------------------------------- */

int
client_connect (struct client *c, const char *uri)
{
  *c = (struct client){ .nbd = nbd_create () };
  if (c->nbd == NULL)
    return client_error (c, "libnbd");
  /* TLS keys are local files that the URI names. */
  if (nbd_set_opt_mode (c->nbd, true) < 0
      || nbd_set_uri_allow_local_file (c->nbd, true) < 0
      || nbd_aio_connect_uri (c->nbd, uri) < 0)
    return client_error (c, "connect");
  return client_wait (&c, 1, CLIENT_ANSWER_MS);
}

void
client_close (struct client *c)
{
  nbd_close (c->nbd);
  c->nbd = NULL;
}

char *
client_export (struct client *c)
{
  return nbd_get_export_name (c->nbd);
}

struct list_call {
  void (*fn) (void *opaque, const char *name);
  void *opaque;
};

static int
on_export (void *opaque, const char *name, const char *description)
{
  struct list_call *call = opaque;

  (void) description;
  call->fn (call->opaque, name);
  return 0;
}

int
client_list (struct client *c, void (*fn) (void *opaque, const char *name),
             void *opaque)
{
  struct list_call call = { fn, opaque };
  nbd_list_callback list = { .callback = on_export, .user_data = &call };
  int err;

  c->failed = 0;
  if (nbd_aio_opt_list (c->nbd, list, answer_to (c)) < 0) {
    c->pending = 0;
    return client_error (c, "list of exports");
  }
  err = client_wait (&c, 1, CLIENT_ANSWER_MS);
  if (err == 0 && c->failed) {
    snprintf (c->error, sizeof c->error, "the server lists no exports");
    err = -c->failed;
  }
  return err;
}

int
client_begin_go (struct client *c, const char *export)
{
  c->failed = 0;
  if (nbd_set_export_name (c->nbd, export) < 0)
    return client_error (c, export);
  if (nbd_aio_opt_go (c->nbd, answer_to (c)) < 0) {
    c->pending = 0;
    return client_error (c, export);
  }
  return 0;
}

bool
client_is_open (struct client *c)
{
  return nbd_aio_is_ready (c->nbd) > 0 && c->failed == 0;
}

int
client_go (struct client *c, const char *export)
{
  int err = client_begin_go (c, export);

  if (err == 0)
    err = client_wait (&c, 1, CLIENT_ANSWER_MS);
  if (err == 0 && !client_is_open (c)) {
    snprintf (c->error, sizeof c->error, "the server has no export '%s'",
              export);
    err = -ENOENT;
  }
  return err;
}

int64_t
client_size (struct client *c)
{
  return nbd_get_size (c->nbd);
}

/* ---- Read --------------------------------------------------------------- */

int
client_begin_read (struct client *c, void *buf, size_t n, uint64_t offset)
{
  if (nbd_aio_pread (c->nbd, buf, n, offset, answer_to (c), 0) < 0) {
    c->pending--;
    return client_error (c, "read");
  }
  return 0;
}

int
client_read (struct client *c, void *buf, size_t n, uint64_t offset)
{
  int err;

  c->failed = 0;
  err = client_begin_read (c, buf, n, offset);
  if (err == 0)
    err = client_wait (&c, 1, CLIENT_ANSWER_MS);
  if (err == 0 && c->failed) {
    snprintf (c->error, sizeof c->error, "read: %s", strerror (c->failed));
    err = -c->failed;
  }
  return err;
}

int
client_read_status (struct client *c, struct vr_status *ret)
{
  int err = client_read (c, ret, sizeof *ret, 0);

  if (err == 0 && !vr_block_ok (ret, VR_STATUS_MAGIC)) {
    snprintf (c->error, sizeof c->error,
              "no status block: not a log export of nbdkit vmrep-backup");
    return -EPROTO;
  }
  if (err == 0 && ret->version != VR_VERSION) {
    snprintf (c->error, sizeof c->error,
              "the backup speaks version %u, this program version %u",
              ret->version, VR_VERSION);
    return -EPROTO;
  }
  /* Terminated or not, these came over the network. */
  if (err == 0) {
    ret->vm[VR_NAME_SIZE - 1] = ret->disk[VR_NAME_SIZE - 1] = 0;
    ret->waiting_for[VR_NAME_SIZE - 1] = 0;
    ret->refusal_text[sizeof ret->refusal_text - 1] = 0;
  }
  return err;
}
