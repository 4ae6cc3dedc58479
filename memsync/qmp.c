/* SPDX-License-Identifier: BSD-3-Clause */
/* See qmp.h.  QEMU ends each message with a newline and writes none inside. */
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "memsync/qmp.h"

#define READ_SIZE 65536U

struct vr_qmp {
  int fd;
  int broken; /* negative errno: the stream has ended or makes no sense */
  struct vr_qmp_version version;
  json_int_t last_id;

  char *buf; /* what was read; [start, end) is not yet parsed */
  size_t size, start, end;
  size_t scanned; /* no newline in [start, scanned) */

  json_t *events[VR_QMP_EVENTS_MAX]; /* a ring */
  unsigned first_event, events_queued;
  bool events_lost;
};

/* ---- Errors ------------------------------------------------------------- */

static int __attribute__ ((format (printf, 3, 4)))
explain (struct vr_qmp_error *error, int err, const char *format, ...)
{
  va_list args;

  if (!error)
    return err;
  error->class[0] = 0;
  va_start (args, format);
  vsnprintf (error->text, sizeof error->text, format, args);
  va_end (args);
  return err;
}

static const char *
what (int err)
{
  switch (err) {
  case -ECONNRESET:
    return "QEMU has closed the connection";
  case -EMSGSIZE:
    return "QEMU's message is too long";
  case -EPROTO:
    return "this is not QMP";
  default:
    return strerror (-err);
  }
}

static int
explain_stream (struct vr_qmp_error *error, int err, const char *name,
                unsigned timeout_ms)
{
  if (err == -ETIMEDOUT)
    return explain (error, err, "%s: no answer within %u ms", name,
                    timeout_ms);
  return explain (error, err, "%s: %s", name, what (err));
}

static int
break_off (struct vr_qmp *q, int err)
{
  q->broken = err;
  return err;
}

/* ---- Time --------------------------------------------------------------- */

static uint64_t
now_ms (void)
{
  struct timespec t;

  clock_gettime (CLOCK_BOOTTIME, &t);
  return (uint64_t) t.tv_sec * 1000 + (uint64_t) t.tv_nsec / 1000000;
}

/* Wait until the socket is ready for `events`. */
static int
wait_ready (const struct vr_qmp *q, short events, uint64_t deadline)
{
  struct pollfd p = { .fd = q->fd, .events = events };
  int n;

  do {
    const uint64_t now = now_ms ();
    const uint64_t left = deadline > now ? deadline - now : 0;

    n = poll (&p, 1, left > INT_MAX ? INT_MAX : (int) left);
  } while (n == -1 && errno == EINTR);
  if (n == -1)
    return -errno;
  return n == 0 ? -ETIMEDOUT : 0;
}

/* ---- Receive ------------------------------------------------------------ */

/* Have room for READ_SIZE bytes more. */
static int
make_room (struct vr_qmp *q)
{
  size_t size = q->size;
  char *p;

  if (q->start > 0) {
    memmove (q->buf, q->buf + q->start, q->end - q->start);
    q->end -= q->start;
    q->scanned -= q->start;
    q->start = 0;
  }
  if (q->end >= VR_QMP_MESSAGE_MAX)
    return break_off (q, -EMSGSIZE);
  while (size - q->end < READ_SIZE)
    size = size ? size * 2 : READ_SIZE;
  if (size == q->size)
    return 0;
  p = realloc (q->buf, size);
  if (!p)
    return -ENOMEM;
  q->buf = p;
  q->size = size;
  return 0;
}

static int
read_some (struct vr_qmp *q, uint64_t deadline)
{
  ssize_t n;
  int err = make_room (q);

  if (err < 0)
    return err;
  for (;;) {
    n = recv (q->fd, q->buf + q->end, READ_SIZE, MSG_DONTWAIT);
    if (n > 0) {
      q->end += (size_t) n;
      return 0;
    }
    if (n == 0)
      return break_off (q, -ECONNRESET);
    if (errno != EAGAIN && errno != EINTR)
      return break_off (q, -errno);
    err = wait_ready (q, POLLIN, deadline);
    if (err < 0)
      return err;
  }
}

/* The next message, of whatever kind. */
static int
receive (struct vr_qmp *q, uint64_t deadline, json_t **ret)
{
  json_error_t json_error;
  char *line, *newline;
  int err;

  if (q->broken)
    return q->broken;
  while (q->scanned == q->end
         || !(newline = memchr (q->buf + q->scanned, '\n',
                                q->end - q->scanned))) {
    q->scanned = q->end;
    err = read_some (q, deadline);
    if (err < 0)
      return err;
  }
  line = q->buf + q->start;
  q->start = q->scanned = (size_t) (newline - q->buf) + 1;
  *ret = json_loadb (line, (size_t) (newline - line), JSON_REJECT_DUPLICATES,
                     &json_error);
  if (!*ret || !json_is_object (*ret)) {
    json_decref (*ret);
    return break_off (q, -EPROTO);
  }
  return 0;
}

/* ---- Events ------------------------------------------------------------- */

static json_t *
take_event (struct vr_qmp *q)
{
  json_t *event = q->events[q->first_event];

  assert (q->events_queued > 0);
  q->first_event = (q->first_event + 1) % VR_QMP_EVENTS_MAX;
  q->events_queued--;
  return event;
}

/* Takes the reference.  The oldest goes when there is no room: what is new
   tells more about the present. */
static void
queue_event (struct vr_qmp *q, json_t *event)
{
  if (q->events_queued == VR_QMP_EVENTS_MAX) {
    json_decref (take_event (q));
    q->events_lost = true;
  }
  q->events[(q->first_event + q->events_queued) % VR_QMP_EVENTS_MAX] = event;
  q->events_queued++;
}

int
vr_qmp_next_event (struct vr_qmp *q, unsigned timeout_ms, json_t **ret)
{
  const uint64_t deadline = now_ms () + timeout_ms;
  json_t *message;
  int err;

  while (!q->events_lost && q->events_queued == 0) {
    err = receive (q, deadline, &message);
    if (err < 0)
      return err;
    if (json_object_get (message, "event"))
      queue_event (q, message);
    else
      json_decref (message); /* the late answer to a command */
  }
  if (q->events_lost) {
    q->events_lost = false;
    return -EOVERFLOW;
  }
  *ret = take_event (q);
  return 0;
}

bool
vr_qmp_has_event (const struct vr_qmp *q)
{
  /* A part of a message is not one; its end makes the socket readable. */
  return q->events_queued > 0 || q->events_lost
         || memchr (q->buf + q->scanned, '\n', q->end - q->scanned);
}

const char *
vr_qmp_event_name (const json_t *event)
{
  const char *name = json_string_value (json_object_get (event, "event"));

  return name ? name : "";
}

/* ---- Send --------------------------------------------------------------- */

/* One sendmsg; fd goes along unless it is -1. */
static ssize_t
send_part (const struct vr_qmp *q, const char *p, size_t n, int fd)
{
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE (sizeof (int))];
  } control = { .space = { 0 } };
  struct iovec iov = { .iov_base = (void *) (uintptr_t) p, .iov_len = n };
  struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

  if (fd != -1) {
    m.msg_control = &control;
    m.msg_controllen = sizeof control.space;
    control.header.cmsg_len = CMSG_LEN (sizeof fd);
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    memcpy (CMSG_DATA (&control.header), &fd, sizeof fd);
  }
  return sendmsg (q->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* A command of which a part is sent cannot be taken back: a deadline in the
   middle of it ends the connection. */
static int
send_all (struct vr_qmp *q, const char *p, size_t left, int fd,
          uint64_t deadline)
{
  bool begun = false;
  int err = 0;

  while (left > 0) {
    const ssize_t n = send_part (q, p, left, begun ? -1 : fd);

    if (n > 0) {
      p += n;
      left -= (size_t) n;
      begun = true;
    }
    else if (errno == EAGAIN)
      err = wait_ready (q, POLLOUT, deadline);
    else if (errno != EINTR)
      return break_off (q, errno == EPIPE ? -ECONNRESET : -errno);
    if (err < 0)
      return begun ? break_off (q, err) : err;
  }
  return 0;
}

/* ---- Commands ----------------------------------------------------------- */

/* The command as one line; NULL when out of memory or not expressible. */
static char *
command_line (const char *name, json_t *arguments, json_int_t id)
{
  json_t *command = json_pack ("{s:s, s:I}", "execute", name, "id", id);
  char *line = NULL;

  if (command && arguments
      && json_object_set (command, "arguments", arguments) < 0) {
    json_decref (command);
    return NULL;
  }
  if (command)
    line = json_dumps (command, JSON_COMPACT);
  json_decref (command);
  return line;
}

static int
send_command (struct vr_qmp *q, const char *name, json_t *arguments, int fd,
              uint64_t deadline)
{
  char *line;
  size_t n;
  int err;

  if (q->broken)
    return q->broken;
  line = command_line (name, arguments, ++q->last_id);
  if (!line)
    return -ENOMEM;
  n = strlen (line);
  line[n] = '\n'; /* in the place of the NUL */
  err = send_all (q, line, n + 1, fd, deadline);
  free (line);
  return err;
}

/* Is the message, which is no event, the answer to the last command?  QEMU
   leaves out the id where it could not parse the command. */
static bool
is_answer (const struct vr_qmp *q, const json_t *message)
{
  const json_t *id = json_object_get (message, "id");

  return !id || json_integer_value (id) == q->last_id;
}

static int
receive_answer (struct vr_qmp *q, uint64_t deadline, json_t **ret)
{
  json_t *message;
  int err;

  for (;;) {
    err = receive (q, deadline, &message);
    if (err < 0)
      return err;
    if (json_object_get (message, "event"))
      queue_event (q, message);
    else if (is_answer (q, message)) {
      *ret = message;
      return 0;
    }
    else
      json_decref (message);
  }
}

static int
refused (const json_t *refusal, const char *name, struct vr_qmp_error *error)
{
  const char *class = json_string_value (json_object_get (refusal, "class"));
  const char *desc = json_string_value (json_object_get (refusal, "desc"));

  explain (error, -EREMOTEIO, "%s: %s", name, desc ? desc : "refused");
  if (error)
    snprintf (error->class, sizeof error->class, "%s", class ? class : "?");
  return -EREMOTEIO;
}

/* Takes the answer apart, and drops it. */
static int
use_answer (struct vr_qmp *q, json_t *answer, const char *name, json_t **ret,
            struct vr_qmp_error *error)
{
  const json_t *refusal = json_object_get (answer, "error");
  json_t *value = json_object_get (answer, "return");
  int err = 0;

  if (refusal)
    err = refused (refusal, name, error);
  else if (!value)
    err = explain (error, break_off (q, -EPROTO), "%s: %s", name,
                   what (-EPROTO));
  else if (ret)
    *ret = json_incref (value);
  json_decref (answer);
  return err;
}

static int
command_with_fd (struct vr_qmp *q, const char *name, json_t *arguments, int fd,
                 unsigned timeout_ms, json_t **ret,
                 struct vr_qmp_error *error)
{
  const uint64_t deadline = now_ms () + timeout_ms;
  json_t *answer = NULL;
  int err = send_command (q, name, arguments, fd, deadline);

  json_decref (arguments);
  if (err == 0)
    err = receive_answer (q, deadline, &answer);
  if (err < 0)
    return explain_stream (error, err, name, timeout_ms);
  return use_answer (q, answer, name, ret, error);
}

int
vr_qmp_command (struct vr_qmp *q, const char *name, json_t *arguments,
                unsigned timeout_ms, json_t **ret, struct vr_qmp_error *error)
{
  return command_with_fd (q, name, arguments, -1, timeout_ms, ret, error);
}

int
vr_qmp_human (struct vr_qmp *q, const char *line, unsigned timeout_ms,
              char **ret, struct vr_qmp_error *error)
{
  json_t *arguments = json_pack ("{s:s}", "command-line", line);
  json_t *output;
  int err;

  if (!arguments)
    return explain (error, -ENOMEM, "%s: %s", line, what (-ENOMEM));
  err = vr_qmp_command (q, "human-monitor-command", arguments, timeout_ms,
                        &output, error);
  if (err < 0)
    return err;
  if (json_is_string (output)) {
    *ret = strdup (json_string_value (output));
    err = *ret ? 0 : explain (error, -ENOMEM, "%s: %s", line, what (-ENOMEM));
  }
  else
    err = explain (error, break_off (q, -EPROTO), "%s: %s", line,
                   what (-EPROTO));
  json_decref (output);
  return err;
}

int
vr_qmp_add_fd (struct vr_qmp *q, int fd, unsigned timeout_ms, int64_t *ret_set,
               int *ret_fd, struct vr_qmp_error *error)
{
  json_int_t set, number;
  json_t *value;
  int err = command_with_fd (q, "add-fd", NULL, fd, timeout_ms, &value, error);

  if (err < 0)
    return err;
  err = json_unpack (value, "{s:I, s:I}", "fdset-id", &set, "fd", &number);
  json_decref (value);
  if (err < 0 || number < 0 || number > INT_MAX)
    return explain (error, -EPROTO, "add-fd: %s", what (-EPROTO));
  *ret_set = set;
  *ret_fd = (int) number;
  return 0;
}

int
vr_qmp_remove_fd (struct vr_qmp *q, int64_t set, unsigned timeout_ms,
                  struct vr_qmp_error *error)
{
  return vr_qmp_command (q, "remove-fd",
                         json_pack ("{s:I}", "fdset-id", (json_int_t) set),
                         timeout_ms, NULL, error);
}

/* ---- Connect ------------------------------------------------------------ */

static int
open_socket (const char *path, int *ret)
{
  struct sockaddr_un a = { .sun_family = AF_UNIX };
  int fd, err;

  if (strlen (path) >= sizeof a.sun_path)
    return -ENAMETOOLONG;
  strcpy (a.sun_path, path);
  /* Not blocking: a full backlog is an error (EAGAIN) and not a wait. */
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd == -1)
    return -errno;
  if (connect (fd, (const struct sockaddr *) &a, sizeof a) == -1) {
    err = -errno;
    close (fd);
    return err;
  }
  *ret = fd;
  return 0;
}

static int
read_greeting (struct vr_qmp *q, uint64_t deadline)
{
  json_t *greeting;
  int major, minor, micro;
  int err = receive (q, deadline, &greeting);

  if (err < 0)
    return err;
  err = json_unpack (greeting, "{s:{s:{s:{s:i, s:i, s:i}}}}", "QMP",
                     "version", "qemu", "major", &major, "minor", &minor,
                     "micro", &micro);
  json_decref (greeting);
  if (err < 0 || major < 0 || minor < 0 || micro < 0)
    return break_off (q, -EPROTO);
  q->version = (struct vr_qmp_version) { (unsigned) major, (unsigned) minor,
                                         (unsigned) micro };
  return 0;
}

static int
greet (struct vr_qmp *q, const char *path, unsigned timeout_ms,
       struct vr_qmp_error *error)
{
  int err = read_greeting (q, now_ms () + timeout_ms);

  if (err == -ETIMEDOUT)
    return explain (error, err,
                    "%s: no greeting within %u ms: does another client hold "
                    "this monitor?", path, timeout_ms);
  if (err < 0)
    return explain (error, err, "%s: %s", path, what (err));
  return vr_qmp_command (q, "qmp_capabilities", NULL, timeout_ms, NULL, error);
}

int
vr_qmp_connect (const char *path, unsigned timeout_ms, struct vr_qmp **ret,
                struct vr_qmp_error *error)
{
  struct vr_qmp *q = calloc (1, sizeof *q);
  int err;

  if (!q)
    return explain (error, -ENOMEM, "%s: %s", path, what (-ENOMEM));
  err = open_socket (path, &q->fd);
  if (err < 0) {
    free (q);
    return explain (error, err, "%s: %s", path, strerror (-err));
  }
  err = greet (q, path, timeout_ms, error);
  if (err < 0) {
    vr_qmp_close (q);
    return err;
  }
  *ret = q;
  return 0;
}

void
vr_qmp_close (struct vr_qmp *q)
{
  if (!q)
    return;
  while (q->events_queued > 0)
    json_decref (take_event (q));
  close (q->fd);
  free (q->buf);
  free (q);
}

int
vr_qmp_fd (const struct vr_qmp *q)
{
  return q->fd;
}

struct vr_qmp_version
vr_qmp_version (const struct vr_qmp *q)
{
  return q->version;
}
