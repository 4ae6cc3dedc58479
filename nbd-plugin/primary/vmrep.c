/* SPDX-License-Identifier: BSD-3-Clause */
/* The nbdkit plugin `vmrep`: parameters, life cycle, the guest's requests.
 *
 * A request is a call into journal/disk.h.  What a flush means is the one
 * thing decided here:
 *
 *   local    the local journal is synced
 *   remote   the epoch that holds the writes is committed at the backup
 *   epoch    nothing: the guest's output is held until that commit anyway
 *   auto     epoch while memsync holds the output and the backup commits,
 *            else local
 */
#include "primary.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/eventfd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "common.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define CACHE_SEGMENTS 16
#define JOURNAL_SIZE_DEFAULT (INT64_C (1) << 30)
#define INTERVAL_DEFAULT_NS UINT64_C (25000000)
#define INTERVAL_MIN_NS UINT64_C (1000000)
#define INTERVAL_MAX_NS UINT64_C (60000000000)

/* nbdkit 1.32 aborts on extents beyond 2^32-1 (CVE-2025-47711). */
#define EXTENT_MAX (UINT64_C (1) << 31)

/* Tell the shipper after so many bytes; write to the journal in pieces. */
#define HINT_BYTES (UINT64_C (512) << 10)
#define WRITE_OUT_BYTES (UINT64_C (1) << 20)

/* A clean stop waits this long for the backup's last commit. */
#define GOODBYE_NS UINT64_C (2000000000)

static struct primary primary = {
  .config = { .journal_size = JOURNAL_SIZE_DEFAULT,
              .interval_ns = INTERVAL_DEFAULT_NS },
};

/* ---- Helpers ------------------------------------------------------------ */

void
event_signal (int fd)
{
  uint64_t one = 1;

  if (write (fd, &one, sizeof one) < 0)
    return; /* already signalled 2^64-2 times */
}

void
event_wait (int fd, int timeout_ms)
{
  struct pollfd p = { .fd = fd, .events = POLLIN };
  uint64_t count;

  if (poll (&p, 1, timeout_ms) > 0
      && read (fd, &count, sizeof count) < 0)
    return; /* another reader was faster */
}

/* ---- Parameters --------------------------------------------------------- */

static int
parse_flush (const char *value)
{
  static const char *const names[]
      = { [FLUSH_AUTO] = "auto", [FLUSH_LOCAL] = "local",
          [FLUSH_REMOTE] = "remote", [FLUSH_EPOCH] = "epoch" };

  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (strcmp (value, names[i]) == 0) {
      primary.config.flush = (enum flush_mode) i;
      return 0;
    }
  nbdkit_error ("flush=%s: must be auto, local, remote or epoch", value);
  return -1;
}

/* A time with its unit: 25ms, 1s, 2500us. */
static int
parse_interval (const char *value)
{
  static const struct {
    const char *suffix;
    uint64_t ns;
  } units[] = { { "us", 1000 }, { "ms", 1000000 }, { "s", 1000000000 } };
  char *end;
  unsigned long long n;

  errno = 0;
  n = strtoull (value, &end, 10);
  for (size_t i = 0; i < sizeof units / sizeof units[0]; i++)
    if (errno == 0 && end != value && value[0] != '-'
        && strcmp (end, units[i].suffix) == 0
        && n <= INTERVAL_MAX_NS / units[i].ns
        && n * units[i].ns >= INTERVAL_MIN_NS) {
      primary.config.interval_ns = n * units[i].ns;
      return 0;
    }
  nbdkit_error ("epoch-interval=%s: must be a time from 1ms to 60s, with its "
                "unit",
                value);
  return -1;
}

static int
parse_name (const char *key, const char *value, char **ret)
{
  if (!vr_name_ok (value)) {
    nbdkit_error ("%s=%s: must be 1 to 63 letters, digits, '.', '_' or '-'",
                  key, value);
    return -1;
  }
  free (*ret);
  *ret = strdup (value);
  return *ret ? 0 : -1;
}

static int
parse_path (const char *value, char **ret)
{
  free (*ret);
  *ret = nbdkit_absolute_path (value);
  return *ret ? 0 : -1;
}

static int
parse_on_loss (const char *value)
{
  if (strcmp (value, "wait") == 0)
    return 0;
  if (strcmp (value, "solo") == 0)
    nbdkit_error ("on-loss=solo: going on without a backup needs a witness "
                  "and is not implemented yet; use on-loss=wait");
  else
    nbdkit_error ("on-loss=%s: must be wait or solo", value);
  return -1;
}

static int
parse_backup (const char *value)
{
  free (primary.config.backup);
  primary.config.backup = NULL;
  if (strcmp (value, "none") == 0)
    return 0;
  primary.config.backup = strdup (value);
  return primary.config.backup ? 0 : -1;
}

static bool backup_given;

static int
vmrep_config (const char *key, const char *value)
{
  struct primary_config *c = &primary.config;
  int r;

  if (strcmp (key, "primary") == 0)
    return parse_path (value, &c->image);
  if (strcmp (key, "backup") == 0) {
    backup_given = true;
    return parse_backup (value);
  }
  if (strcmp (key, "vm") == 0)
    return parse_name (key, value, &c->vm);
  if (strcmp (key, "disk") == 0)
    return parse_name (key, value, &c->disk);
  if (strcmp (key, "node") == 0)
    return parse_name (key, value, &c->node);
  if (strcmp (key, "journal") == 0)
    return parse_path (value, &c->journal);
  if (strcmp (key, "journal-size") == 0) {
    c->journal_size = nbdkit_parse_size (value);
    return c->journal_size < 0 ? -1 : 0;
  }
  if (strcmp (key, "epoch") == 0)
    return parse_path (value, &c->epoch_path);
  if (strcmp (key, "epoch-interval") == 0)
    return parse_interval (value);
  if (strcmp (key, "flush") == 0)
    return parse_flush (value);
  if (strcmp (key, "on-loss") == 0)
    return parse_on_loss (value);
  if (strcmp (key, "unsafe") == 0) {
    r = nbdkit_parse_bool (value);
    c->unsafe = r > 0;
    return r < 0 ? -1 : 0;
  }
  if (strcmp (key, "witness") == 0) {
    nbdkit_error ("witness=%s: witnesses are not implemented yet", value);
    return -1;
  }
  nbdkit_error ("unknown parameter '%s'", key);
  return -1;
}

static int
default_path (char **path, const char *suffix)
{
  if (*path)
    return 0;
  return asprintf (path, "%s%s", primary.config.image, suffix) < 0 ? -1 : 0;
}

static int
default_node (void)
{
  char host[VR_NAME_SIZE];

  if (primary.config.node)
    return 0;
  if (gethostname (host, sizeof host) < 0)
    host[0] = 0;
  host[sizeof host - 1] = 0;
  primary.config.node = strdup (vr_name_ok (host) ? host : "primary");
  return primary.config.node ? 0 : -1;
}

static int
missing (const char *what)
{
  nbdkit_error ("%s", what);
  return -1;
}

static int
vmrep_config_complete (void)
{
  struct primary_config *c = &primary.config;
  uint64_t segment_size, segment_count;

  if (c->image == NULL)
    return missing ("primary=IMAGE is required: the raw file or block device "
                    "that is the guest's disk");
  if (!backup_given)
    return missing ("backup=NBD-URI is required (backup=none runs without "
                    "one)");
  if (c->vm == NULL)
    return missing ("vm=NAME is required: the same name for all disks of the "
                    "VM");
  if (c->disk == NULL && (c->disk = strdup ("disk0")) == NULL)
    return -1;
  if (c->flush == FLUSH_REMOTE && c->backup == NULL)
    return missing ("flush=remote contradicts backup=none");
  if (vr_log_geometry ((uint64_t) c->journal_size, &segment_size,
                       &segment_count) < 0) {
    nbdkit_error ("journal-size=%lld: must be between %lld and %lld bytes; "
                  "one request may need %lld",
                  (long long) c->journal_size, (long long) VR_JOURNAL_MIN,
                  (long long) VR_JOURNAL_MAX, (long long) VR_JOURNAL_MIN);
    return -1;
  }
  if (default_path (&c->journal, ".journal") < 0
      || default_path (&c->epoch_path, ".epoch") < 0)
    return -1;
  return default_node ();
}

#define vmrep_config_help                                                     \
  "[primary=]IMAGE      (required) The raw file or block device served.\n"    \
  "backup=NBD-URI|none  (required) Where nbdkit vmrep-backup listens.\n"      \
  "vm=NAME              (required) The VM this disk belongs to.\n"            \
  "disk=NAME            This disk's name in the VM [disk0].\n"                \
  "journal=PATH         The journal [IMAGE.journal].\n"                       \
  "journal-size=SIZE    Size of a new journal [1G].\n"                        \
  "epoch=PATH           Epoch counter all disks of the VM share\n"            \
  "                     [IMAGE.epoch].\n"                                     \
  "epoch-interval=TIME  Time between commits [25ms].\n"                       \
  "flush=MODE           What a flush waits for: auto, local, remote,\n"       \
  "                     epoch [auto].\n"                                      \
  "on-loss=wait|solo    What to do without the backup [wait].\n"              \
  "witness=URI          Who decides about solo and promotion.\n"              \
  "node=NAME            This host's name in messages [host name].\n"          \
  "unsafe=BOOL          Allow flush=epoch though nothing holds the\n"         \
  "                     guest's output [false]."

static void
vmrep_dump_plugin (void)
{
  printf ("vmrep_journal_version=%d\n", VR_VERSION);
  printf ("vmrep_epoch_version=%d\n", VR_EPOCH_VERSION);
  printf ("vmrep_flush_modes=auto,local,remote,epoch\n");
  printf ("vmrep_journal_size_min=%llu\n",
          (unsigned long long) VR_JOURNAL_MIN);
}

/* ---- Start -------------------------------------------------------------- */

/* Asked by whoever waits for journal space. */
static bool
keep_waiting (void *opaque)
{
  struct primary *p = opaque;

  if (atomic_load (&p->stopping) || atomic_load (&p->fenced))
    return false;
  event_signal (p->apply_event);
  /* The copier is no server thread and only obeys `stopping`. */
  if (p->copier_started && pthread_equal (pthread_self (), p->copier))
    return true;
  return !plugin_should_stop ();
}

static int
open_epoch (struct primary *p, uint8_t vm_id[16], uint64_t open_min)
{
  int err = vr_epoch_open (p->config.epoch_path, p->config.vm, vm_id,
                           open_min, &p->epoch);

  if (err < 0)
    nbdkit_error ("epoch file %s: %s", p->config.epoch_path,
                  err == -EXDEV     ? "belongs to another VM"
                  : err == -EBADMSG ? "is not an epoch file"
                  : err == -EPROTO  ? "is of a newer format"
                                    : strerror (-err));
  return err;
}

/* The VM's id comes from the journal if there is one, else from the epoch
   file, which draws one: so disks that start together agree. */
static int
open_disk (struct primary *p)
{
  struct vr_disk_config dc = {
    .image = p->config.image, .journal = p->config.journal,
    .journal_size = (uint64_t) p->config.journal_size,
    .vm = p->config.vm, .disk = p->config.disk,
    .cache_segments = CACHE_SEGMENTS, .direct = true,
  };
  struct vr_log_info info;
  char message[512];
  int err = vr_disk_open (vr_io_real (), &dc, &p->disk, message,
                          sizeof message);

  if (err == -ENOENT && message[0] == 0) {
    err = open_epoch (p, dc.vm_id, 1);
    if (err < 0)
      return err;
    dc.create = true;
    err = vr_disk_open (vr_io_real (), &dc, &p->disk, message,
                        sizeof message);
    p->journal_created = err == 0;
  }
  if (err < 0) {
    nbdkit_error ("%s", message[0] ? message : strerror (-err));
    return err;
  }
  p->log = p->disk->log;
  p->disk->keep_waiting = keep_waiting;
  p->disk->opaque = p;
  vr_log_info (p->log, &info);
  if (p->epoch == NULL)
    err = open_epoch (p, info.super.vm_id, info.super.epoch_limit);
  if (err == 0)
    vr_epoch_raise_generation (p->epoch, info.super.generation);
  return err;
}

static int
join_epoch (struct primary *p)
{
  int err = vr_epoch_join (p->epoch, p->config.disk, VR_MEMBER_DISK,
                           &p->slot);

  if (err == -EBUSY)
    nbdkit_error ("disk %s of VM %s is being served by another process "
                  "(epoch file %s)",
                  p->config.disk, p->config.vm, p->config.epoch_path);
  else if (err < 0)
    nbdkit_error ("epoch file %s: %s", p->config.epoch_path,
                  err == -ENOSPC ? "too many disks" : strerror (-err));
  return err;
}

/* flush=epoch is only right while output is held. */
static int
check_flush_mode (struct primary *p)
{
  bool held = atomic_load (&vr_epoch_page (p->epoch)->output)
              & VR_EPOCH_OUTPUT_HELD;

  if (p->config.flush != FLUSH_EPOCH || held || p->config.unsafe)
    return 0;
  nbdkit_error ("flush=epoch: nothing holds the guest's output, so a flush "
                "it has seen could be lost; use flush=auto, or say "
                "unsafe=true");
  return -1;
}

static int
vmrep_get_ready (void)
{
  struct primary *p = &primary;
  int err;

  p->started_ns = vr_now_ns (vr_io_real ());
  if (open_disk (p) < 0 || join_epoch (p) < 0 || check_flush_mode (p) < 0)
    goto err;
  if (p->config.backup && primary_probe (p) < 0)
    goto err;
  err = vr_disk_start (p->disk, p->epoch);
  if (err < 0) {
    nbdkit_error ("journal %s: %s", p->config.journal, strerror (-err));
    goto err;
  }
  return 0;

 err:
  /* Left behind it would stand in the way of the next try, with another
     name or size. */
  if (p->journal_created)
    unlink (p->config.journal);
  return -1;
}

/* nbdkit may have forked: locks came along, but the pid is another, and
   threads start only now. */
static int
vmrep_after_fork (void)
{
  struct primary *p = &primary;
  pthread_condattr_t attr;

  vr_epoch_forked (p->epoch, p->slot);
  pthread_mutex_init (&p->mutex, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&p->committed_changed, &attr);
  pthread_condattr_destroy (&attr);
  window_init (p);
  p->ship_event = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  p->apply_event = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (p->ship_event < 0 || p->apply_event < 0) {
    nbdkit_error ("eventfd: %m");
    return -1;
  }
  atomic_store (&p->slot->state,
                p->config.backup ? VR_STATE_CONNECTING : VR_STATE_ALONE);
  p->applier_started
      = pthread_create (&p->applier, NULL, primary_applier, p) == 0;
  p->syncer_started
      = pthread_create (&p->syncer, NULL, primary_syncer, p) == 0;
  p->clock_started = pthread_create (&p->clock, NULL, primary_clock, p) == 0;
  if (p->config.backup) {
    p->shipper_started
        = pthread_create (&p->shipper, NULL, primary_shipper, p) == 0;
    p->copier_started
        = pthread_create (&p->copier, NULL, primary_copier, p) == 0;
  }
  if (!p->applier_started || !p->syncer_started || !p->clock_started
      || (p->config.backup && !(p->shipper_started && p->copier_started))) {
    nbdkit_error ("cannot start threads");
    return -1;
  }
  return 0;
}

/* ---- Stop --------------------------------------------------------------- */

static void
stop_threads (struct primary *p)
{
  atomic_store (&p->stopping, true);
  if (!p->clock_started)
    return;
  event_signal (p->ship_event);
  event_signal (p->apply_event);
  pthread_mutex_lock (&p->mutex);
  pthread_cond_broadcast (&p->committed_changed);
  pthread_mutex_unlock (&p->mutex);
  if (p->copier_started)
    pthread_join (p->copier, NULL);
  pthread_join (p->clock, NULL);
  if (p->shipper_started)
    pthread_join (p->shipper, NULL);
  if (p->applier_started)
    pthread_join (p->applier, NULL);
  if (p->syncer_started)
    pthread_join (p->syncer, NULL);
}

/* Seal what is there and give the backup a moment to commit it. */
static void
say_goodbye (struct primary *p)
{
  uint64_t start = vr_now_ns (p->disk->io), epoch;

  if (!p->clock_started || atomic_load (&p->fenced))
    return;
  epoch = primary_cut_now (p);
  while (vr_now_ns (p->disk->io) - start < GOODBYE_NS
         && (atomic_load (&p->slot->state) == VR_STATE_PROTECTED
             || atomic_load (&p->slot->state) == VR_STATE_ALONE)) {
    bool done;

    pthread_mutex_lock (&p->mutex);
    done = p->committed_epoch >= epoch;
    pthread_mutex_unlock (&p->mutex);
    if (done)
      break;
    usleep (1000);
  }
}

/* After the last connection: everything acknowledged is made durable. */
static void
vmrep_cleanup (void)
{
  struct primary *p = &primary;
  uint64_t n;
  int err;

  if (p->disk == NULL || p->slot == NULL)
    return;
  say_goodbye (p);
  stop_threads (p);
  err = vr_disk_sync (p->disk);
  while (err == 0 && (err = vr_image_apply (&p->disk->img, 0, &n)) == 0
         && n > 0)
    ;
  if (err == 0)
    err = vr_image_checkpoint (&p->disk->img);
  if (err == 0)
    err = vr_log_set_flags (p->log, VR_LOG_CLEAN, 0);
  if (err < 0)
    nbdkit_error ("journal %s: at the end: %s", p->config.journal,
                  strerror (-err));
}

static void
vmrep_unload (void)
{
  struct primary_config *c = &primary.config;

  vr_epoch_close (primary.epoch);
  vr_disk_close (primary.disk);
  free (c->image);
  free (c->backup);
  free (c->vm);
  free (c->disk);
  free (c->journal);
  free (c->epoch_path);
  free (c->node);
}

/* ---- Connections -------------------------------------------------------- */

struct handle {
  bool is_view;
  struct view_export view;
};

static void *
vmrep_open (int readonly)
{
  const char *name = nbdkit_export_name ();
  struct handle *h = calloc (1, sizeof *h);

  (void) readonly;
  if (h == NULL || name == NULL) {
    free (h);
    return NULL;
  }
  if (name[0] == '@') {
    h->is_view = true;
    if (view_export_open (&h->view, &primary.disk->img, name + 1) == 0)
      return h;
  } else if (name[0] == 0 || strcmp (name, primary.config.disk) == 0)
    return h;
  else
    nbdkit_error ("there is no export '%s' here, only '%s'", name,
                  primary.config.disk);
  free (h);
  return NULL;
}

static void
vmrep_close (void *handle)
{
  struct handle *h = handle;

  if (h->is_view)
    view_export_close (&h->view);
  free (h);
}

static int
vmrep_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  (void) readonly;
  (void) is_tls;
  if (nbdkit_add_export (exports, primary.config.disk, "the guest's disk") < 0)
    return -1;
  return nbdkit_add_export (exports, "@committed",
                            "the disk at the last committed epoch");
}

static const char *
vmrep_default_export (int readonly, int is_tls)
{
  (void) readonly;
  (void) is_tls;
  return primary.config.disk;
}

static int64_t
vmrep_get_size (void *handle)
{
  struct handle *h = handle;

  return h->is_view ? (int64_t) view_export_size (&h->view)
                    : (int64_t) primary.disk->size;
}

static int
vmrep_can_write (void *handle)
{
  return !((struct handle *) handle)->is_view;
}

static int
vmrep_can_fua (void *handle)
{
  (void) handle;
  return NBDKIT_FUA_NATIVE;
}

/* One disk behind all connections, and a flush on any covers them all. */
static int
vmrep_can_multi_conn (void *handle)
{
  (void) handle;
  return 1;
}

static int
vmrep_can_cache (void *handle)
{
  return ((struct handle *) handle)->is_view ? NBDKIT_CACHE_NONE
                                             : NBDKIT_CACHE_NATIVE;
}

static int
vmrep_can_extents (void *handle)
{
  return !((struct handle *) handle)->is_view;
}

/* Zeroing is one record, whatever the length. */
static int
vmrep_can_fast_zero (void *handle)
{
  (void) handle;
  return 1;
}

/* ---- Requests ----------------------------------------------------------- */

/* Requests of a fenced primary must fail, reads too: what it holds is no
   longer the disk. */
static int
check_serving (void)
{
  if (!atomic_load (&primary.fenced))
    return 0;
  nbdkit_error ("VM %s is owned by another primary now", primary.config.vm);
  return plugin_errno (-ESHUTDOWN);
}

static int
result (int err, const char *what)
{
  if (err == 0)
    return 0;
  nbdkit_error ("%s: %s", what, strerror (-err));
  return plugin_errno (err);
}

static int
vmrep_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
             uint32_t flags)
{
  struct handle *h = handle;

  (void) flags;
  if (h->is_view)
    return view_export_read (&h->view, buf, count, offset);
  if (check_serving () < 0)
    return -1;
  return result (vr_disk_read (primary.disk, buf, count, offset), "read");
}

/* May a flush rely on the commit that all output waits for? */
static bool
output_waits (const struct primary *p)
{
  bool held = atomic_load (&vr_epoch_page (p->epoch)->output)
              & VR_EPOCH_OUTPUT_HELD;

  switch (p->config.flush) {
  case FLUSH_EPOCH:
    return held || p->config.unsafe;
  case FLUSH_AUTO:
    return held && atomic_load (&p->slot->state) == VR_STATE_PROTECTED;
  default:
    return false;
  }
}

/* Wait for the commit of everything written so far.  If it is sealed already
   there is no need for another cut. */
static int
flush_remote (struct primary *p)
{
  struct vr_log_info info;
  uint64_t epoch;

  vr_log_info (p->log, &info);
  if (info.head == info.committed)
    return 0;
  epoch = info.head == info.sealed_lsn ? info.sealed_epoch
                                       : primary_cut_now (p);
  return primary_wait_committed (p, epoch);
}

static int
flush_now (struct primary *p)
{
  if (output_waits (p))
    return 0;
  if (p->config.flush == FLUSH_REMOTE)
    return flush_remote (p);
  return vr_disk_sync (p->disk);
}

static int
vmrep_flush (void *handle, uint32_t flags)
{
  (void) handle;
  (void) flags;
  if (check_serving () < 0)
    return -1;
  return result (flush_now (&primary), "flush");
}

/* The end of every request that changes the disk. */
static int
after_write (int err, uint32_t flags, const char *what)
{
  if (err == 0 && (flags & NBDKIT_FLAG_FUA))
    err = flush_now (&primary);
  return result (err, what);
}

/* Not all at the cut: have full batches sent, and bytes written to the
   journal, while the epoch is open.  One caller in many gets to do it. */
static int
pass_on (struct primary *p)
{
  uint64_t head = vr_log_head (p->log);
  uint64_t hinted = atomic_load_explicit (&p->hinted_lsn,
                                          memory_order_relaxed);

  if (head - hinted < HINT_BYTES
      || !atomic_compare_exchange_strong (&p->hinted_lsn, &hinted, head))
    return 0;
  if (p->config.backup)
    primary_ship (p, false);
  return vr_log_write_out (p->log, WRITE_OUT_BYTES);
}

static int
vmrep_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset,
              uint32_t flags)
{
  int err;

  (void) handle;
  if (check_serving () < 0)
    return -1;
  err = window_enter (&primary);
  if (err == 0)
    err = vr_disk_write (primary.disk, buf, count, offset);
  if (err == 0)
    err = pass_on (&primary);
  return after_write (err, flags, "write");
}

static int
vmrep_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) handle;
  if (check_serving () < 0)
    return -1;
  return after_write (vr_disk_zero (primary.disk, count, offset,
                                    flags & NBDKIT_FLAG_MAY_TRIM),
                      flags, "zero");
}

static int
vmrep_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) handle;
  if (check_serving () < 0)
    return -1;
  return after_write (vr_disk_zero (primary.disk, count, offset, true), flags,
                      "trim");
}

static int
vmrep_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct vr_file *base = primary.disk->base;

  (void) handle;
  (void) flags;
  return result (base->io->ops->prefetch (base, offset, count), "cache");
}

static int
vmrep_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
               struct nbdkit_extents *extents)
{
  uint64_t end = offset + count;
  int err = 0;

  (void) handle;
  if (check_serving () < 0)
    return -1;
  while (err == 0 && offset < end) {
    uint64_t n = 0;
    bool zero = false;

    err = vr_disk_extent (primary.disk, offset, primary.disk->size, &n,
                          &zero);
    if (err < 0)
      break;
    if (n > EXTENT_MAX)
      n = EXTENT_MAX;
    if (nbdkit_add_extent (extents, offset, n,
                           zero ? NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO : 0)
        < 0)
      return -1;
    offset += n;
    if (flags & NBDKIT_FLAG_REQ_ONE)
      break;
  }
  return result (err, "extents");
}

static struct nbdkit_plugin plugin = {
  .name = "vmrep",
  .longname = "vmrep: a guest's disk, replicated by epoch",
  .version = VMREP_VERSION,
  .description = "Serves a disk image, journals its writes by epoch and "
                 "replicates them to nbdkit vmrep-backup.",
  .load = plugin_bound_memory,
  .config = vmrep_config,
  .config_complete = vmrep_config_complete,
  .config_help = vmrep_config_help,
  .magic_config_key = "primary",
  .dump_plugin = vmrep_dump_plugin,
  .get_ready = vmrep_get_ready,
  .after_fork = vmrep_after_fork,
  .cleanup = vmrep_cleanup,
  .unload = vmrep_unload,
  .list_exports = vmrep_list_exports,
  .default_export = vmrep_default_export,
  .open = vmrep_open,
  .close = vmrep_close,
  .get_size = vmrep_get_size,
  .can_write = vmrep_can_write,
  .can_flush = vmrep_can_write,
  .can_trim = vmrep_can_write,
  .can_zero = vmrep_can_write,
  .can_fast_zero = vmrep_can_fast_zero,
  .can_fua = vmrep_can_fua,
  .can_multi_conn = vmrep_can_multi_conn,
  .can_cache = vmrep_can_cache,
  .can_extents = vmrep_can_extents,
  .pread = vmrep_pread,
  .pwrite = vmrep_pwrite,
  .flush = vmrep_flush,
  .trim = vmrep_trim,
  .zero = vmrep_zero,
  .cache = vmrep_cache,
  .extents = vmrep_extents,
  .errno_is_preserved = 1,
};

NBDKIT_REGISTER_PLUGIN (plugin)
