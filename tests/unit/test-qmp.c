/* SPDX-License-Identifier: BSD-3-Clause */
/* memsync/qmp.h, with a server that plays a script, and with a real QEMU. */
#include "util.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "memsync/qmp.h"

#define GREETING                                                              \
  "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, "         \
  "\"major\": 7}, \"package\": \"x\"}, \"capabilities\": [\"oob\"]}}\r\n"
#define EVENT(name)                                                           \
  "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"" name \
  "\"}\r\n"
#define SOON 2000 /* ms; for what should come at once */

/* ---- A server ----------------------------------------------------------- */

/* What the server does: sends the greeting, then for each line of the client
   the next answer, with ID in it replaced by the line's id. */
struct server {
  char path[108];
  int listener;
  const char *greeting;
  const char *answers[8]; /* NULL: close the connection */
  char last_line[4096];
  int passed_fd; /* -1: none came */
  pthread_t thread;
};

static bool
send_text (int fd, const char *text, size_t n)
{
  return send (fd, text, n, MSG_NOSIGNAL) == (ssize_t) n;
}

/* One line of the client with the descriptor that came along. */
static bool
receive_line (struct server *s, int fd)
{
  size_t n = 0;

  while (n == 0 || s->last_line[n - 1] != '\n') {
    char control[CMSG_SPACE (sizeof (int))];
    struct iovec iov = { s->last_line + n, sizeof s->last_line - 1 - n };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1,
                        .msg_control = control,
                        .msg_controllen = sizeof control };
    const ssize_t got = recvmsg (fd, &m, 0);
    struct cmsghdr *c = CMSG_FIRSTHDR (&m);

    if (got <= 0)
      return false;
    if (c && c->cmsg_type == SCM_RIGHTS)
      memcpy (&s->passed_fd, CMSG_DATA (c), sizeof (int));
    n += (size_t) got;
  }
  s->last_line[n] = 0;
  return true;
}

static bool
answer (struct server *s, int fd, const char *text)
{
  const char *id = strstr (s->last_line, "\"id\":");
  const char *at = strstr (text, "ID");
  char number[32];

  if (!id || !at)
    return send_text (fd, text, strlen (text));
  snprintf (number, sizeof number, "%lld", strtoll (id + 5, NULL, 10));
  return send_text (fd, text, (size_t) (at - text))
         && send_text (fd, number, strlen (number))
         && send_text (fd, at + 2, strlen (at + 2));
}

static void *
serve (void *opaque)
{
  struct server *s = opaque;
  const int fd = accept (s->listener, NULL, NULL);

  if (fd == -1)
    return NULL;
  send_text (fd, s->greeting, strlen (s->greeting));
  for (unsigned i = 0; i < 8; i++)
    if (!receive_line (s, fd) || !s->answers[i]
        || !answer (s, fd, s->answers[i]))
      break;
  close (fd);
  return NULL;
}

static void
start_server (struct server *s, const struct env *e, const char *greeting)
{
  struct sockaddr_un a = { .sun_family = AF_UNIX };

  s->greeting = greeting;
  s->passed_fd = -1;
  snprintf (s->path, sizeof s->path, "%s", in_dir (e, "qmp"));
  strcpy (a.sun_path, s->path);
  s->listener = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert_int_equal (bind (s->listener, (struct sockaddr *) &a, sizeof a), 0);
  assert_int_equal (listen (s->listener, 1), 0);
  assert_int_equal (pthread_create (&s->thread, NULL, serve, s), 0);
}

/* Closing the client ended the server's read. */
static void
stop_server (struct server *s)
{
  shutdown (s->listener, SHUT_RDWR);
  pthread_join (s->thread, NULL);
  close (s->listener);
  if (s->passed_fd != -1)
    close (s->passed_fd);
}

#define OK "{\"return\": {}, \"id\": ID}\r\n"

static struct vr_qmp *
connect_to (struct server *s, const struct env *e)
{
  struct vr_qmp_error error;
  struct vr_qmp *q = NULL;

  s->answers[0] = OK;
  start_server (s, e, GREETING);
  if (vr_qmp_connect (s->path, SOON, &q, &error) < 0)
    fail_msg ("%s", error.text);
  return q;
}

/* ---- Tests -------------------------------------------------------------- */

static void
test_command (void **state)
{
  struct server s = { .answers = { 0, "{\"return\": {\"a\": 5}, \"id\": ID}\n",
                                   OK } };
  struct vr_qmp *q = connect_to (&s, *state);
  json_t *value;

  assert_int_equal (vr_qmp_version (q).major, 7);
  assert_int_equal (vr_qmp_version (q).minor, 2);
  assert_int_equal (vr_qmp_version (q).micro, 22);
  assert_int_equal (vr_qmp_command (q, "one", json_pack ("{s:s}", "x", "\n"),
                                    SOON, &value, NULL), 0);
  assert_int_equal (json_integer_value (json_object_get (value, "a")), 5);
  json_decref (value);
  assert_non_null (strstr (s.last_line, "\"execute\":\"one\""));
  assert_non_null (strstr (s.last_line, "\"arguments\":{\"x\":\"\\n\"}"));
  assert_int_equal (vr_qmp_command (q, "two", NULL, SOON, NULL, NULL), 0);
  vr_qmp_close (q);
  stop_server (&s);
}

static void
test_refusal (void **state)
{
  struct server s = {
    .answers = { 0, "{\"error\": {\"class\": \"CommandNotFound\", "
                    "\"desc\": \"no such thing\"}, \"id\": ID}\r\n",
                 "{\"error\": {}}\r\n", OK } };
  struct vr_qmp *q = connect_to (&s, *state);
  struct vr_qmp_error error;

  assert_int_equal (vr_qmp_command (q, "one", NULL, SOON, NULL, &error),
                    -EREMOTEIO);
  assert_string_equal (error.class, "CommandNotFound");
  assert_string_equal (error.text, "one: no such thing");
  assert_int_equal (vr_qmp_command (q, "two", NULL, SOON, NULL, &error),
                    -EREMOTEIO);
  assert_string_equal (error.text, "two: refused");
  assert_int_equal (vr_qmp_command (q, "three", NULL, SOON, NULL, &error), 0);
  vr_qmp_close (q);
  stop_server (&s);
}

static void
assert_next_event (struct vr_qmp *q, unsigned timeout_ms, const char *name)
{
  json_t *event;

  assert_int_equal (vr_qmp_next_event (q, timeout_ms, &event), 0);
  assert_string_equal (vr_qmp_event_name (event), name);
  json_decref (event);
}

/* Events before, between and behind answers keep their order. */
static void
test_events (void **state)
{
  struct server s = { .answers = { 0, EVENT ("STOP") EVENT ("RESUME") OK
                                        EVENT ("RESET"), OK EVENT ("END") } };
  struct vr_qmp *q = connect_to (&s, *state);
  json_t *event;

  assert_false (vr_qmp_has_event (q));
  assert_int_equal (vr_qmp_next_event (q, 0, &event), -ETIMEDOUT);
  assert_int_equal (vr_qmp_command (q, "one", NULL, SOON, NULL, NULL), 0);
  assert_true (vr_qmp_has_event (q));
  assert_next_event (q, 0, "STOP");
  assert_int_equal (vr_qmp_command (q, "two", NULL, SOON, NULL, NULL), 0);
  assert_next_event (q, 0, "RESUME");
  assert_next_event (q, SOON, "RESET");
  assert_next_event (q, SOON, "END");
  assert_int_equal (vr_qmp_next_event (q, 20, &event), -ETIMEDOUT);
  vr_qmp_close (q);
  stop_server (&s);
}

static void
test_event_flood (void **state)
{
  const unsigned count = VR_QMP_EVENTS_MAX + 3;
  const size_t size = count * 64 + 64;
  char *flood = malloc (size);
  struct server s = { .answers = { 0 } };
  struct vr_qmp *q;
  json_t *event;
  size_t n = 0;

  assert_non_null (flood);
  for (unsigned i = 0; i < count; i++)
    n += (size_t) snprintf (flood + n, size - n, "{\"event\": \"E%u\"}\n", i);
  snprintf (flood + n, size - n, OK);
  s.answers[1] = flood;
  q = connect_to (&s, *state);
  assert_int_equal (vr_qmp_command (q, "one", NULL, SOON, NULL, NULL), 0);
  assert_int_equal (vr_qmp_next_event (q, 0, &event), -EOVERFLOW);
  assert_next_event (q, 0, "E3");
  vr_qmp_close (q);
  stop_server (&s);
  free (flood);
}

/* The late answer to one command is not taken for that of the next. */
static void
test_timeout (void **state)
{
  struct server s = {
    .answers = { 0, EVENT ("SLOW"),
                 "{\"return\": {\"late\": 1}, \"id\": 2}\r\n"
                 "{\"return\": {\"late\": 0}, \"id\": ID}\r\n" } };
  struct vr_qmp *q = connect_to (&s, *state);
  struct vr_qmp_error error;
  json_t *value;

  assert_int_equal (vr_qmp_command (q, "one", NULL, 30, NULL, &error),
                    -ETIMEDOUT);
  assert_string_equal (error.text, "one: no answer within 30 ms");
  assert_string_equal (error.class, "");
  assert_int_equal (vr_qmp_command (q, "two", NULL, SOON, &value, NULL), 0);
  assert_int_equal (json_integer_value (json_object_get (value, "late")), 0);
  json_decref (value);
  assert_next_event (q, 0, "SLOW");
  vr_qmp_close (q);
  stop_server (&s);
}

static void
break_with (const struct env *e, const char *text, int expected)
{
  struct server s = { .answers = { 0, text } };
  struct vr_qmp *q = connect_to (&s, e);
  struct vr_qmp_error error = { .text = "" };
  json_t *event;

  assert_int_equal (vr_qmp_command (q, "one", NULL, SOON, NULL, &error),
                    expected);
  assert_true (error.text[0] != 0);
  /* It stays so. */
  assert_int_equal (vr_qmp_command (q, "two", NULL, SOON, NULL, NULL),
                    expected);
  assert_int_equal (vr_qmp_next_event (q, SOON, &event), expected);
  vr_qmp_close (q);
  stop_server (&s);
  unlink (s.path);
}

static void
test_broken_streams (void **state)
{
  char *deep = malloc (20001);
  char *big = malloc (VR_QMP_MESSAGE_MAX + 2 * 65536 + 1);

  assert_non_null (deep);
  assert_non_null (big);
  memset (deep, '[', 20000);
  strcpy (deep + 19999, "\n");
  memset (big, ' ', VR_QMP_MESSAGE_MAX + 2 * 65536);
  big[VR_QMP_MESSAGE_MAX + 2 * 65536] = 0;
  break_with (*state, NULL, -ECONNRESET);
  break_with (*state, "nonsense\n", -EPROTO);
  break_with (*state, "[1]\n", -EPROTO);
  break_with (*state, "{\"id\": ID}\n", -EPROTO);
  break_with (*state, "{\"return\": {}, \"return\": {}, \"id\": ID}\n",
              -EPROTO);
  break_with (*state, deep, -EPROTO);
  break_with (*state, big, -EMSGSIZE);
  free (deep);
  free (big);
}

static void
refuse_greeting (const struct env *e, const char *greeting, int expected)
{
  struct server s = { .answers = { OK } };
  struct vr_qmp_error error = { .text = "" };
  struct vr_qmp *q = NULL;

  start_server (&s, e, greeting);
  assert_int_equal (vr_qmp_connect (s.path, 50, &q, &error), expected);
  assert_non_null (strstr (error.text, s.path));
  stop_server (&s);
  unlink (s.path);
}

static void
test_greeting (void **state)
{
  struct vr_qmp_error error;
  struct vr_qmp *q;

  refuse_greeting (*state, "", -ETIMEDOUT);
  refuse_greeting (*state, "hello\n", -EPROTO);
  refuse_greeting (*state, "{\"QMP\": {\"version\": 7}}\n", -EPROTO);
  refuse_greeting (*state, "{}\n", -EPROTO);
  assert_int_equal (vr_qmp_connect (in_dir (*state, "none"), SOON, &q, &error),
                    -ENOENT);
}

static void
test_pass_fd (void **state)
{
  struct server s = {
    .answers = { 0, "{\"return\": {\"fdset-id\": 3, \"fd\": 41}, "
                    "\"id\": ID}\r\n",
                 "{\"return\": {\"fd\": -1, \"fdset-id\": 3}, "
                 "\"id\": ID}\r\n" } };
  struct vr_qmp *q = connect_to (&s, *state);
  struct stat here, there;
  int64_t set;
  int fd;

  assert_int_equal (stat ("/dev/null", &here), 0);
  fd = open ("/dev/null", O_RDONLY | O_CLOEXEC);
  assert_int_equal (vr_qmp_add_fd (q, fd, SOON, &set, &fd, NULL), 0);
  assert_int_equal (set, 3);
  assert_int_equal (fd, 41);
  assert_int_equal (fstat (s.passed_fd, &there), 0);
  assert_true (here.st_rdev == there.st_rdev);
  assert_int_equal (vr_qmp_add_fd (q, 0, SOON, &set, &fd, NULL), -EPROTO);
  vr_qmp_close (q);
  stop_server (&s);
}

/* ---- A real QEMU -------------------------------------------------------- */

static pid_t
start_qemu (const char *path)
{
  char monitor[160];
  const pid_t pid = fork ();

  if (pid != 0)
    return pid;
  prctl (PR_SET_PDEATHSIG, SIGKILL);
  snprintf (monitor, sizeof monitor, "unix:%s,server=on,wait=off", path);
  if (!freopen ("/dev/null", "r", stdin) || !freopen ("/dev/null", "w", stdout)
      || !freopen ("/dev/null", "w", stderr))
    _exit (126);
  execlp ("qemu-system-x86_64", "qemu-system-x86_64", "-accel", "tcg", "-m",
          "16", "-nodefaults", "-display", "none", "-S", "-qmp", monitor,
          (char *) NULL);
  _exit (127);
}

static struct vr_qmp *
connect_to_qemu (const char *path, pid_t pid)
{
  struct vr_qmp_error error = { .text = "?" };
  struct vr_qmp *q;

  for (unsigned i = 0; i < 1000; i++) {
    if (vr_qmp_connect (path, 5000, &q, &error) == 0)
      return q;
    if (waitpid (pid, NULL, WNOHANG) == pid)
      return NULL;
    usleep (10000);
  }
  fail_msg ("%s", error.text);
  return NULL;
}

static void
talk_to_qemu (struct vr_qmp *q)
{
  struct vr_qmp_error error;
  json_t *value, *event;
  int64_t set;
  char *text;
  int fd;

  assert_true (vr_qmp_version (q).major >= 5);
  assert_int_equal (vr_qmp_command (q, "query-status", NULL, 5000, &value,
                                    &error), 0);
  assert_false (json_is_true (json_object_get (value, "running")));
  json_decref (value);
  assert_int_equal (vr_qmp_command (q, "nonsense", NULL, 5000, NULL, &error),
                    -EREMOTEIO);
  assert_string_equal (error.class, "CommandNotFound");
  assert_int_equal (vr_qmp_human (q, "info status", 5000, &text, NULL), 0);
  assert_non_null (strstr (text, "paused"));
  free (text);
  assert_int_equal (vr_qmp_add_fd (q, 0, 5000, &set, &fd, &error), 0);
  assert_int_equal (vr_qmp_remove_fd (q, set, 5000, &error), 0);
  assert_int_equal (vr_qmp_remove_fd (q, set + 1, 5000, &error), -EREMOTEIO);
  assert_int_equal (vr_qmp_command (q, "cont", NULL, 5000, NULL, &error), 0);
  assert_next_event (q, 5000, "RESUME");
  assert_int_equal (vr_qmp_command (q, "quit", NULL, 5000, NULL, &error), 0);
  do {
    const int err = vr_qmp_next_event (q, 5000, &event);

    if (err < 0) {
      assert_int_equal (err, -ECONNRESET);
      return;
    }
    text = strdup (vr_qmp_event_name (event));
    json_decref (event);
    fd = strcmp (text, "SHUTDOWN");
    free (text);
  } while (fd != 0);
}

static void
test_qemu (void **state)
{
  const char *path = in_dir (*state, "real");
  const pid_t pid = start_qemu (path);
  struct vr_qmp *q;

  assert_true (pid > 0);
  q = connect_to_qemu (path, pid);
  if (!q)
    skip (); /* no QEMU here */
  talk_to_qemu (q);
  vr_qmp_close (q);
  kill (pid, SIGKILL);
  waitpid (pid, NULL, 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    ON_REAL (test_command),   ON_REAL (test_refusal),
    ON_REAL (test_events),    ON_REAL (test_event_flood),
    ON_REAL (test_timeout),   ON_REAL (test_broken_streams),
    ON_REAL (test_greeting),  ON_REAL (test_pass_fd),
    ON_REAL (test_qemu),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
