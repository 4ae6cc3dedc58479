/* SPDX-License-Identifier: BSD-3-Clause */
/* The connection to a backup; see link.h. */
#include "link.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

/* Connecting and the handshake, and every answer after it that does not wait
   for a commit. */
#define DEADLINE_MS 5000

/* Unacknowledged data for so long means that the other host is gone. */
#define USER_TIMEOUT_MS 5000

static int
link_error (struct link *l, const char *what)
{
  int err = nbd_get_errno ();

  l->err = err ? -err : -EIO;
  snprintf (l->error, sizeof l->error, "%s: %s", what,
            nbd_get_error () ? nbd_get_error () : "unknown error");
  return l->err;
}

static int64_t
now_ms (void)
{
  struct timespec t;

  clock_gettime (CLOCK_BOOTTIME, &t);
  return (int64_t) t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int
link_poll (struct link *l, int event_fd, int timeout_ms)
{
  struct pollfd fds[2] = { { .fd = nbd_aio_get_fd (l->nbd) },
                           { .fd = event_fd, .events = POLLIN } };
  unsigned dir = nbd_aio_get_direction (l->nbd);
  int r = 0;

  if (dir & LIBNBD_AIO_DIRECTION_READ)
    fds[0].events |= POLLIN;
  if (dir & LIBNBD_AIO_DIRECTION_WRITE)
    fds[0].events |= POLLOUT;
  if (poll (fds, event_fd >= 0 ? 2 : 1, timeout_ms) < 0 && errno != EINTR)
    return -errno;
  if ((dir & LIBNBD_AIO_DIRECTION_READ)
      && (fds[0].revents & (POLLIN | POLLHUP)))
    r = nbd_aio_notify_read (l->nbd);
  else if ((dir & LIBNBD_AIO_DIRECTION_WRITE)
           && (fds[0].revents & (POLLOUT | POLLHUP)))
    r = nbd_aio_notify_write (l->nbd);
  if (r < 0)
    return link_error (l, "connection lost");
  if ((fds[0].revents & (POLLERR | POLLNVAL))
      || nbd_aio_is_dead (l->nbd) > 0 || nbd_aio_is_closed (l->nbd) > 0) {
    l->err = -ECONNRESET;
    snprintf (l->error, sizeof l->error, "the connection was closed");
    return l->err;
  }
  return 0;
}

/* Let libnbd work until done says so. */
static int
work_until (struct link *l, bool (*done) (struct link *l, int64_t cookie),
            int64_t cookie, const char *what)
{
  int64_t end = now_ms () + DEADLINE_MS;

  while (!done (l, cookie)) {
    int64_t left = end - now_ms ();
    int err;

    if (left <= 0) {
      l->err = -ETIMEDOUT;
      snprintf (l->error, sizeof l->error, "%s: no answer for %d ms", what,
                DEADLINE_MS);
      return l->err;
    }
    err = link_poll (l, -1, (int) left);
    if (err < 0)
      return err;
  }
  return 0;
}

/* Negotiating (an option is answered or awaited), or past that. */
static bool
handshake_pauses (struct link *l, int64_t cookie)
{
  (void) cookie;
  return nbd_aio_is_negotiating (l->nbd) > 0
         || nbd_aio_is_ready (l->nbd) > 0;
}

static bool
is_completed (struct link *l, int64_t cookie)
{
  return nbd_aio_peek_command_completed (l->nbd) == cookie;
}

/* Not for unix sockets, where it fails and is not needed. */
static void
set_user_timeout (struct link *l)
{
  int fd = nbd_aio_get_fd (l->nbd), ms = USER_TIMEOUT_MS;

  if (setsockopt (fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof ms) < 0)
    return;
}

int
link_open (struct link *l, const char *uri, const char *vm, const char *disk)
{
  char export[2 * VR_NAME_SIZE + 2];
  int err;

  *l = (struct link){ .nbd = nbd_create () };
  if (l->nbd == NULL)
    return link_error (l, "libnbd");
  snprintf (export, sizeof export, "%s/%s", vm, disk);
  /* Option mode, because the URI may have no path and the export's name is
     ours to say. */
  if (nbd_set_opt_mode (l->nbd, true) < 0
      || nbd_set_uri_allow_local_file (l->nbd, true) < 0
      || nbd_aio_connect_uri (l->nbd, uri) < 0)
    return link_error (l, "connect");
  err = work_until (l, handshake_pauses, 0, "connect");
  if (err < 0)
    return err;
  set_user_timeout (l);
  if (nbd_set_export_name (l->nbd, export) < 0
      || nbd_aio_opt_go (l->nbd, NBD_NULL_COMPLETION) < 0)
    return link_error (l, "export");
  err = work_until (l, handshake_pauses, 0, "handshake");
  if (err == 0 && nbd_aio_is_ready (l->nbd) <= 0) {
    l->err = err = -ENOENT;
    snprintf (l->error, sizeof l->error,
              "the server refused export %s (is it nbdkit vmrep-backup? does "
              "it require TLS, a URI with nbds://?)",
              export);
  }
  return err;
}

void
link_close (struct link *l)
{
  nbd_close (l->nbd);
  l->nbd = NULL;
}

bool
link_is_up (struct link *l)
{
  return l->nbd && nbd_aio_is_ready (l->nbd) > 0;
}

/* Wait for one command's end; its error if it failed. */
static int
finish (struct link *l, int64_t cookie, const char *what)
{
  int err;

  if (cookie < 0)
    return link_error (l, what);
  err = work_until (l, is_completed, cookie, what);
  if (err == 0 && nbd_aio_command_completed (l->nbd, (uint64_t) cookie) < 0)
    err = link_error (l, what);
  return err;
}

int
link_read_status (struct link *l, struct vr_status *ret)
{
  int64_t cookie = nbd_aio_pread (l->nbd, ret, sizeof *ret, 0,
                                  NBD_NULL_COMPLETION, 0);

  return finish (l, cookie, "reading the status");
}

int
link_write_hello (struct link *l, const struct vr_hello *h)
{
  int64_t cookie = nbd_aio_pwrite (l->nbd, h, sizeof *h, 0,
                                   NBD_NULL_COMPLETION, 0);

  return finish (l, cookie, "hello");
}
