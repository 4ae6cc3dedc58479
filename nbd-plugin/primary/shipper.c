/* SPDX-License-Identifier: BSD-3-Clause */
/* The shipper thread: sends the log to the backup, learns of commits.
 *
 *   connect ─ status ─ plan ─ hello ─┬─ ship … ship ─ lost ─ back off ─┐
 *      ▲                             └─ refused ─ back off ────────────┤
 *      └───────────────────────────────────────────────────────────────┘
 *
 * Writes go out in LSN order, up to WINDOW_WRITES of them unanswered, seals
 * with FUA.  Small batches wait for company until a seal comes or someone is
 * waiting: a wake-up costs more than the bytes.
 */
#include "primary.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "link.h"

/* nbdkit serves a connection with 16 threads; a write waiting for its commit
   holds one of them. */
#define WINDOW_WRITES 12
#define WINDOW_SEALS 4

/* Less than this goes out only with a seal or on request. */
#define BATCH_MIN (256U << 10)

#define BACKOFF_MIN_MS 50
#define BACKOFF_MAX_MS 2000

/* No answer to a data write for so long: the link is dead.  Seals may wait
   for other members of the VM, but then every one of them does. */
#define PROGRESS_NS UINT64_C (5000000000)

/* How often to ask for commits nobody tells about. */
#define ASK_NS UINT64_C (100000000)

struct shipper {
  struct primary *p;
  struct link link;
  struct vr_ship_cursor cursor;
  uint64_t session;
  unsigned writes, seals; /* in flight */
  int failed;             /* errno of a write that the backup refused */
  uint64_t progress_ns;   /* last answer, or last time nothing was owed */
  uint64_t asked_ns;      /* when ask_committed last did */
  char said[600];         /* last message, so as not to repeat it */
  bool was_connected;
  bool probing; /* only looking, before anything runs */
};

/* One write in flight. */
struct sent {
  struct shipper *s;
  struct vr_segbuf *segment;
  uint64_t end;
  uint64_t sealed_epoch;
  uint64_t cut_ns; /* of the first seal in it */
};

static uint64_t
now_ns (void)
{
  return vr_now_ns (vr_io_real ());
}

/* Tell the operator, once per new thing to tell. */
static void
say (struct shipper *s, const char *text)
{
  if (strcmp (s->said, text) == 0)
    return;
  snprintf (s->said, sizeof s->said, "%s", text);
  nbdkit_error ("%s", text);
}

static void
set_state (struct primary *p, enum vr_member_state state)
{
  atomic_store (&p->slot->state, (uint32_t) state);
}

/* ---- Commits ------------------------------------------------------------ */

void
primary_committed (struct primary *p, uint64_t epoch)
{
  struct vr_mark mark;

  if (vr_log_commit (p->log, epoch) < 0)
    return; /* the log is dead; every request says so */
  vr_log_committed_mark (p->log, &mark);
  atomic_store (&p->committed_lsn, mark.lsn);
  pthread_mutex_lock (&p->mutex);
  if (epoch > p->committed_epoch)
    p->committed_epoch = epoch;
  pthread_cond_broadcast (&p->committed_changed);
  pthread_mutex_unlock (&p->mutex);
  vr_epoch_set_committed (p->epoch, epoch);
  atomic_store (&p->slot->committed_epoch, epoch);
  atomic_store (&p->slot->commit_time_ns, now_ns ());
  event_signal (p->apply_event);
}

int
primary_wait_step (struct primary *p)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  t.tv_nsec += 50000000;
  t.tv_sec += t.tv_nsec / 1000000000;
  t.tv_nsec %= 1000000000;
  pthread_cond_timedwait (&p->committed_changed, &p->mutex, &t);
  return atomic_load (&p->stopping) || atomic_load (&p->fenced) ? -ESHUTDOWN
                                                                : 0;
}

int
primary_wait_committed (struct primary *p, uint64_t epoch)
{
  int err = 0;

  pthread_mutex_lock (&p->mutex);
  while (p->committed_epoch < epoch && err == 0)
    err = primary_wait_step (p);
  pthread_mutex_unlock (&p->mutex);
  return err;
}

void
primary_ship (struct primary *p, bool now)
{
  if (now)
    atomic_store (&p->ship_now, true);
  event_signal (p->ship_event);
}

/* ---- Writes in flight --------------------------------------------------- */

/* libnbd calls this when a write was answered, or will never be. */
static int
on_answer (void *opaque, int *error)
{
  struct sent *w = opaque;
  struct shipper *s = w->s;
  struct primary *p = s->p;

  s->writes--;
  if (w->sealed_epoch)
    s->seals--;
  s->progress_ns = now_ns ();
  if (*error)
    s->failed = s->failed ? s->failed : *error;
  else {
    if (w->end > atomic_load (&p->slot->shipped_lsn))
      atomic_store (&p->slot->shipped_lsn, w->end);
    if (w->sealed_epoch) {
      atomic_fetch_add (&p->slot->commits, 1);
      atomic_store (&p->slot->commit_ns, s->progress_ns - w->cut_ns);
      window_committed (p, s->progress_ns - w->cut_ns);
      primary_committed (p, w->sealed_epoch);
    }
  }
  return 1;
}

static void
free_sent (void *opaque)
{
  struct sent *w = opaque;

  vr_log_put_segment (w->s->p->log, w->segment);
  free (w);
}

/* Hand one batch to libnbd. */
static int
send_batch (struct shipper *s, const struct vr_ship_batch *b)
{
  struct sent *w = malloc (sizeof *w);
  nbd_completion_callback answer
      = { .callback = on_answer, .user_data = w, .free = free_sent };

  struct vr_seal seal;

  if (w == NULL) {
    vr_log_put_segment (s->p->log, b->segment);
    return -ENOMEM;
  }
  *w = (struct sent){ .s = s, .segment = b->segment,
                      .end = b->lsn + b->size,
                      .sealed_epoch = b->sealed_epoch, .cut_ns = now_ns () };
  if (b->sealed_epoch && vr_log_next_seal (s->p->log, b->lsn, &seal)
      && seal.since)
    w->cut_ns = seal.since;
  if (s->writes == 0)
    s->progress_ns = now_ns ();
  s->writes++;
  if (b->sealed_epoch)
    s->seals++;
  if (nbd_aio_pwrite (s->link.nbd, b->data, b->size, b->lsn, answer,
                      b->sealed_epoch ? LIBNBD_CMD_FLAG_FUA : 0)
      < 0)
    return -EIO; /* answer was freed, and the link is dead */
  return 0;
}

/* Is there something worth a write? */
static bool
worth_sending (struct shipper *s)
{
  struct vr_log_info info;
  struct vr_seal seal;

  vr_log_info (s->p->log, &info);
  if (info.complete - s->cursor.at.lsn >= BATCH_MIN)
    return true;
  if (vr_log_last_durable_seal (s->p->log, &seal)
      && seal.lsn > s->cursor.at.lsn)
    return true;
  return atomic_exchange (&s->p->ship_now, false);
}

static int
fill_window (struct shipper *s)
{
  while (s->writes < WINDOW_WRITES && s->seals < WINDOW_SEALS
         && worth_sending (s)) {
    struct vr_ship_batch batch;
    int err = vr_log_ship_batch (s->p->log, &s->cursor, &batch);

    if (err < 0) {
      snprintf (s->link.error, sizeof s->link.error,
                "reading the journal: %s", strerror (-err));
      return err;
    }
    if (batch.size == 0)
      break;
    err = send_batch (s, &batch);
    if (err < 0)
      return err;
  }
  return 0;
}

/* ---- The initial copy --------------------------------------------------- */

static void
request_copy (struct primary *p)
{
  pthread_mutex_lock (&p->mutex);
  p->copy_wanted = true;
  p->copied_epoch = 0;
  p->copy_round++;
  pthread_cond_broadcast (&p->committed_changed);
  pthread_mutex_unlock (&p->mutex);
}

/* Has the copier finished, and is the epoch that holds its last record
   committed? */
static bool
copy_committed (struct primary *p)
{
  bool done;

  pthread_mutex_lock (&p->mutex);
  done = p->copied_epoch && p->committed_epoch >= p->copied_epoch;
  if (done) {
    p->copied_epoch = 0;
    p->copy_wanted = false;
  }
  pthread_mutex_unlock (&p->mutex);
  return done;
}

/* Tell the backup that its image is whole. */
static int
finish_copy (struct shipper *s)
{
  struct vr_ship_plan plan = { .plan = VR_PLAN_COPY };
  struct vr_hello hello;
  int err = vr_ship_hello (s->p->log, &plan, s->p->config.node, s->session,
                           &hello);

  if (err < 0)
    return err;
  hello.mode = VR_HELLO_COPIED;
  vr_block_seal (&hello);
  err = link_write_hello (&s->link, &hello);
  if (err == 0) {
    set_state (s->p, VR_STATE_PROTECTED);
    nbdkit_debug ("the backup has a complete copy");
  }
  return err;
}

/* ---- One connection ----------------------------------------------------- */

/* The backup said no, or went away: what does its status say? */
static void
explain_failure (struct shipper *s, int err)
{
  struct vr_status st;
  char text[600];

  if (link_is_up (&s->link) && link_read_status (&s->link, &st) == 0
      && vr_block_ok (&st, VR_STATUS_MAGIC) && st.refusal) {
    st.refusal_text[sizeof st.refusal_text - 1] = 0;
    snprintf (text, sizeof text, "backup %s: %s", s->p->config.backup,
              st.refusal_text);
    if (st.refusal == VR_REFUSED_GENERATION
        || st.refusal == VR_REFUSED_PROMOTED) {
      atomic_store (&s->p->fenced, true);
      set_state (s->p, VR_STATE_FENCED);
    }
  } else
    snprintf (text, sizeof text, "backup %s: %s%s", s->p->config.backup,
              s->link.error[0] ? s->link.error : strerror (-err),
              "; trying again");
  say (s, text);
}

/* Read the status and decide; fenced and refused are said and give -EPERM. */
static int
make_plan (struct shipper *s, struct vr_ship_plan *plan)
{
  struct vr_status status;
  char text[600];
  int err = link_read_status (&s->link, &status);

  if (err < 0)
    return err;
  err = vr_ship_plan (s->p->log, &status, plan);
  if (err < 0) {
    snprintf (s->link.error, sizeof s->link.error, "no valid status: %s",
              strerror (-err));
    return err;
  }
  if (plan->plan == VR_PLAN_FENCED || plan->plan == VR_PLAN_REFUSED) {
    snprintf (text, sizeof text, "backup %s: %s", s->p->config.backup,
              plan->why);
    say (s, text);
    if (plan->plan == VR_PLAN_FENCED) {
      atomic_store (&s->p->fenced, true);
      set_state (s->p, VR_STATE_FENCED);
    }
    return -EPERM;
  }
  /* What the backup committed while we did not hear of it. */
  if (!s->probing && plan->committed_epoch)
    primary_committed (s->p, plan->committed_epoch);
  return 0;
}

/* Seals that an earlier connection sent are answered by nobody once other
   members let them commit.  With none of our own under way, look. */
static int
ask_committed (struct shipper *s)
{
  struct vr_status status;
  struct vr_ship_plan plan;
  struct vr_seal seal;
  int err;

  if (s->seals > 0 || now_ns () - s->asked_ns < ASK_NS
      || !vr_log_next_seal (s->p->log, 0, &seal)
      || seal.lsn > s->cursor.at.lsn)
    return 0;
  s->asked_ns = now_ns ();
  err = link_read_status (&s->link, &status);
  if (err == 0)
    err = vr_ship_plan (s->p->log, &status, &plan);
  if (err == 0 && plan.committed_epoch)
    primary_committed (s->p, plan.committed_epoch);
  return err;
}

static int
introduce (struct shipper *s, struct vr_ship_plan *plan)
{
  struct vr_hello hello;
  int err;

  do
    err = vr_io_real ()->ops->random (vr_io_real (), &s->session,
                                      sizeof s->session);
  while (err == 0 && s->session == 0);
  if (err == 0)
    err = vr_ship_hello (s->p->log, plan, s->p->config.node, s->session,
                         &hello);
  if (err < 0) {
    snprintf (s->link.error, sizeof s->link.error, "%s",
              err == -EAGAIN ? "journal is full" : strerror (-err));
    return err;
  }
  return link_write_hello (&s->link, &hello);
}

/* Connected and accepted: ship until something breaks. */
static int
ship (struct shipper *s)
{
  struct primary *p = s->p;
  int err = 0;

  while (err == 0 && !atomic_load (&p->stopping)) {
    err = fill_window (s);
    if (err == 0)
      err = link_poll (&s->link, p->ship_event, 100);
    event_wait (p->ship_event, 0);
    if (err == 0 && s->failed)
      err = -s->failed;
    if (err == 0)
      err = ask_committed (s);
    if (err == 0 && copy_committed (p))
      err = finish_copy (s);
    if (s->writes == s->seals)
      s->progress_ns = now_ns ();
    else if (err == 0 && now_ns () - s->progress_ns > PROGRESS_NS) {
      snprintf (s->link.error, sizeof s->link.error,
                "no answer for %llu ms",
                (unsigned long long) (PROGRESS_NS / 1000000));
      err = -ETIMEDOUT;
    }
  }
  return err;
}

static void
announce (struct shipper *s, const struct vr_ship_plan *plan)
{
  struct primary *p = s->p;
  bool copy = plan->plan != VR_PLAN_RESUME;

  s->said[0] = 0;
  set_state (p, copy ? VR_STATE_COPYING : VR_STATE_PROTECTED);
  if (s->was_connected)
    atomic_fetch_add (&p->slot->reconnects, 1);
  s->was_connected = true;
  nbdkit_debug ("backup %s: %s from LSN %llu", p->config.backup,
                copy ? "initial copy" : "going on",
                (unsigned long long) plan->start.lsn);
  if (copy)
    request_copy (p);
}

/* A life of one connection.  Returns true if it got as far as shipping. */
static bool
converse (struct shipper *s)
{
  struct primary *p = s->p;
  struct vr_ship_plan plan;
  bool shipped = false;
  int err = link_open (&s->link, p->config.backup, p->config.vm,
                       p->config.disk);

  s->writes = s->seals = 0;
  s->failed = 0;
  if (err == 0)
    err = make_plan (s, &plan);
  if (err == 0)
    err = introduce (s, &plan);
  if (err == 0) {
    shipped = true;
    s->cursor = (struct vr_ship_cursor){ .at = plan.start };
    announce (s, &plan);
    err = ship (s);
  }
  if (err < 0 && err != -EPERM && !atomic_load (&p->stopping))
    explain_failure (s, err);
  link_close (&s->link);
  vr_log_ship_cursor_end (p->log, &s->cursor);
  return shipped;
}

void *
primary_shipper (void *opaque)
{
  struct primary *p = opaque;
  struct shipper s = { .p = p };
  int backoff_ms = BACKOFF_MIN_MS;

  pthread_setname_np (pthread_self (), "vmrep-ship");
  while (!atomic_load (&p->stopping) && !atomic_load (&p->fenced)) {
    set_state (p, VR_STATE_CONNECTING);
    if (converse (&s))
      backoff_ms = BACKOFF_MIN_MS;
    if (atomic_load (&p->stopping) || atomic_load (&p->fenced))
      break;
    set_state (p, VR_STATE_CONNECTING);
    for (int left = backoff_ms;
         left > 0 && !atomic_load (&p->stopping); left -= 50)
      usleep (50000);
    backoff_ms = backoff_ms * 2 < BACKOFF_MAX_MS ? backoff_ms * 2
                                                 : BACKOFF_MAX_MS;
  }
  return NULL;
}

int
primary_probe (struct primary *p)
{
  struct shipper s = { .p = p, .probing = true };
  struct vr_ship_plan plan;
  int err = link_open (&s.link, p->config.backup, p->config.vm,
                       p->config.disk);

  if (err == 0)
    err = make_plan (&s, &plan);
  if (err < 0 && err != -EPERM)
    nbdkit_error ("backup %s: %s; starting without it and trying again",
                  p->config.backup,
                  s.link.error[0] ? s.link.error : strerror (-err));
  link_close (&s.link);
  return err == -EPERM ? -1 : 0;
}
