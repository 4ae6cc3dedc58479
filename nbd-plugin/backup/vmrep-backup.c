/* SPDX-License-Identifier: BSD-3-Clause */
/* The nbdkit plugin `vmrep-backup`: logs of many VMs, committed epochs applied
 * to their images.
 *
 * Exports:
 *   VM/DISK               the log: offset 0 is the status block and takes the
 *                         hello, any other offset is an LSN (journal/format.h)
 *   VM/DISK@committed     the disk at the last commit, read-only
 *   VM/DISK@EPOCH[.xxh3]  see nbd-plugin/common.h
 *
 * What a request means is in journal/vm.h; here are parameters, exports and
 * one thread that applies for all VMs.
 */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "common.h"
#include "vm.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define VMS_MAX 256

/* A writer unheard of for so long has lost its place. */
#define WRITER_TIMEOUT_NS UINT64_C (2000000000)

/* Apply gathers this long, shorter while much comes, and takes so much of a
   log at once.  An image is synced when a share of the journal waits for that
   (journal/vm.c), or when nothing came for a second. */
#define GATHER_US 20000
#define GATHER_LONG_US 100000
#define GATHER_MUCH (UINT64_C (1) << 20)
#define APPLY_BYTES (UINT64_C (16) << 20)
#define CHECKPOINT_IDLE_NS UINT64_C (1000000000)
#define ERROR_PAUSE_US 500000

static char *dir;
static bool sync_memory;

/* VMs are only ever added while the server runs. */
static pthread_mutex_t vms_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct served {
  struct vr_vm *vm;
  pthread_t applier, syncer;
  bool started;
  atomic_bool leave; /* the applier shall end, alone */
  _Atomic uint64_t busy_ns; /* when something was last applied */
} vms[VMS_MAX];
static size_t vm_count;
static bool running; /* threads may be started */
static atomic_bool stopping;

static int start_threads (struct served *s);

/* ---- Parameters --------------------------------------------------------- */

static int
vmrep_backup_config (const char *key, const char *value)
{
  if (strcmp (key, "dir") == 0) {
    free (dir);
    dir = nbdkit_realpath (value);
    return dir ? 0 : -1;
  }
  if (strcmp (key, "sync") == 0) {
    sync_memory = strcmp (value, "memory") == 0;
    if (sync_memory || strcmp (value, "disk") == 0)
      return 0;
    nbdkit_error ("sync=%s: must be disk or memory", value);
    return -1;
  }
  if (strcmp (key, "ram-dir") == 0) {
    nbdkit_error ("ram-dir=%s: memory logs are not implemented yet", value);
    return -1;
  }
  nbdkit_error ("unknown parameter '%s'", key);
  return -1;
}

static int
vmrep_backup_config_complete (void)
{
  struct stat st;

  if (dir == NULL) {
    nbdkit_error ("dir=DIR is required: where journals and images are kept");
    return -1;
  }
  if (stat (dir, &st) < 0 || !S_ISDIR (st.st_mode)) {
    nbdkit_error ("dir=%s: not a directory", dir);
    return -1;
  }
  if (access (dir, W_OK) < 0) {
    nbdkit_error ("dir=%s: %m", dir);
    return -1;
  }
  return 0;
}

#define vmrep_backup_config_help                                              \
  "[dir=]DIR          (required) Where journals and images are kept.\n"       \
  "sync=disk|memory   Commit when on disk, or when in memory of this\n"       \
  "                   host [disk].\n"                                         \
  "ram-dir=DIR        Where the RAM of protected guests is kept\n"            \
  "                   [/dev/shm]."

static void
vmrep_backup_dump_plugin (void)
{
  printf ("vmrep_journal_version=%d\n", VR_VERSION);
  printf ("vmrep_sync_modes=disk,memory\n");
}

/* ---- Connections -------------------------------------------------------- */

struct handle {
  char vm_name[VR_NAME_SIZE];
  char disk[VR_NAME_SIZE];
  bool is_view;
  struct view_export view;

  atomic_bool gone;    /* the client is, or we are stopping */
  atomic_flag looking; /* one waiter is enough to find that out */

  pthread_mutex_t mutex; /* what follows */
  struct vr_vm *vm;      /* NULL: nothing of that name here yet */
  struct vr_vm_member *member; /* after a hello */
  uint64_t session;
  struct vr_refused refused; /* the last refusal, for the status block */
};

/* Asked by everybody who waits for a turn, for space or for a commit.  nbdkit
   reports each look at a dead connection as an error, so only one looks. */
static bool
keep_waiting (void *opaque)
{
  struct handle *h = opaque;

  if (atomic_load (&stopping))
    return false;
  if (!atomic_load (&h->gone) && !atomic_flag_test_and_set (&h->looking)) {
    if (plugin_should_stop ())
      atomic_store (&h->gone, true);
    atomic_flag_clear (&h->looking);
  }
  return !atomic_load (&h->gone);
}

/* nbdkit before 1.33.10 aborts when one thread's reply fails on a connection
 * that another thread is about to reply on (its commit 9d82aa4f).  Threads that
 * were waiting when the client died all know it at once, so let them go one
 * at a time: the first one's failure then stops the others in time. */
static void
leave_one_by_one (void)
{
  static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;

  pthread_mutex_lock (&door);
  usleep (10000);
  pthread_mutex_unlock (&door);
}

/* ---- VMs ---------------------------------------------------------------- */

/* Open one and remember it.  vms_mutex held, or no threads yet. */
static int
add_vm (const char *name, bool create, struct vr_vm **ret)
{
  struct vr_vm_config c = { .dir = dir, .name = name, .create = create,
                            .sync_memory = sync_memory,
                            .writer_timeout_ns = WRITER_TIMEOUT_NS,
                            .keep_waiting = keep_waiting };
  char message[512];
  int err;

  if (vm_count == VMS_MAX) {
    nbdkit_error ("VM %s: %d VMs are open already", name, VMS_MAX);
    return -ENOSPC;
  }
  err = vr_vm_open (vr_io_real (), &c, ret, message, sizeof message);
  if (err < 0) {
    nbdkit_error ("VM %s: %s", name, message[0] ? message : strerror (-err));
    return err;
  }
  vms[vm_count] = (struct served){ .vm = *ret };
  /* The others go on; this one refuses its writers and says why. */
  if ((*ret)->damaged.code)
    nbdkit_error ("VM %s: %s", name, (*ret)->damaged.text);
  err = start_threads (&vms[vm_count]);
  if (err < 0) {
    nbdkit_error ("VM %s: cannot start threads", name);
    vr_vm_close (*ret);
    return err;
  }
  vm_count++;
  return 0;
}

static struct vr_vm *
find_vm (const char *name, bool create)
{
  struct vr_vm *vm = NULL;

  pthread_mutex_lock (&vms_mutex);
  for (size_t i = 0; i < vm_count; i++)
    if (strcmp (vms[i].vm->name, name) == 0)
      vm = vms[i].vm;
  if (vm == NULL && create && add_vm (name, true, &vm) < 0)
    vm = NULL;
  pthread_mutex_unlock (&vms_mutex);
  return vm;
}

static struct vr_vm *
vm_at (size_t i)
{
  struct vr_vm *vm;

  pthread_mutex_lock (&vms_mutex);
  vm = i < vm_count ? vms[i].vm : NULL;
  pthread_mutex_unlock (&vms_mutex);
  return vm;
}

/* Every subfolder with an epoch file is a VM. */
static int
vmrep_backup_get_ready (void)
{
  DIR *d = opendir (dir);
  struct dirent *e;
  int err = 0;

  if (d == NULL) {
    nbdkit_error ("%s: %m", dir);
    return -1;
  }
  while (err == 0 && (e = readdir (d)) != NULL) {
    struct vr_vm *vm;
    char *page;

    if (!vr_name_ok (e->d_name))
      continue;
    if (asprintf (&page, "%s/%s/epoch", dir, e->d_name) < 0) {
      err = -ENOMEM;
      break;
    }
    if (access (page, F_OK) == 0)
      err = add_vm (e->d_name, false, &vm);
    free (page);
  }
  closedir (d);
  return err < 0 ? -1 : 0;
}

/* ---- Background work ---------------------------------------------------- */

/* An error stays with its VM: its journal keeps everything, and fills, and
   then its writer is told. */
static void
say_apply_error (struct vr_vm *vm, int err)
{
  nbdkit_error ("VM %s: applying committed epochs: %s; the journal keeps them",
                vm->name, strerror (-err));
}

/* One such thread for each VM: what is committed goes onto the images. */
static void *
apply_thread (void *opaque)
{
  struct served *s = opaque;
  struct vr_io *io = vr_io_real ();

  pthread_setname_np (pthread_self (), "vmrep-apply");
  while (!atomic_load (&stopping) && !atomic_load (&s->leave)) {
    uint64_t bytes = 0;
    int err = vr_vm_apply (s->vm, APPLY_BYTES, &bytes);

    if (bytes > 0)
      atomic_store (&s->busy_ns, vr_now_ns (io));
    if (err < 0) {
      say_apply_error (s->vm, err);
      usleep (ERROR_PAUSE_US);
    } else if (bytes < APPLY_BYTES)
      usleep (bytes < GATHER_MUCH ? GATHER_LONG_US : GATHER_US);
  }
  return NULL;
}

/* And one that syncs the images, which may take seconds, so that applying
   goes on meanwhile. */
static void *
checkpoint_thread (void *opaque)
{
  struct served *s = opaque;
  struct vr_io *io = vr_io_real ();

  pthread_setname_np (pthread_self (), "vmrep-sync");
  while (!atomic_load (&stopping)) {
    bool idle = vr_now_ns (io) - atomic_load (&s->busy_ns)
                > CHECKPOINT_IDLE_NS;
    int err = vr_vm_checkpoint (s->vm, idle ? 1 : UINT64_MAX);

    if (err < 0) {
      say_apply_error (s->vm, err);
      usleep (ERROR_PAUSE_US);
    }
    usleep (GATHER_US);
  }
  return NULL;
}

/* vms_mutex held. */
static int
start_threads (struct served *s)
{
  if (!running || s->vm->damaged.code || s->started)
    return 0;
  if (pthread_create (&s->applier, NULL, apply_thread, s) != 0)
    return -EAGAIN;
  if (pthread_create (&s->syncer, NULL, checkpoint_thread, s) != 0) {
    atomic_store (&s->leave, true);
    pthread_join (s->applier, NULL);
    return -EAGAIN;
  }
  s->started = true;
  return 0;
}

static int
vmrep_backup_after_fork (void)
{
  int err = 0;

  pthread_mutex_lock (&vms_mutex);
  running = true;
  for (size_t i = 0; i < vm_count && err == 0; i++)
    err = start_threads (&vms[i]);
  pthread_mutex_unlock (&vms_mutex);
  if (err < 0)
    nbdkit_error ("cannot start threads");
  return err < 0 ? -1 : 0;
}

/* Everything committed is in the images when the server ends in order. */
static void
vmrep_backup_cleanup (void)
{
  atomic_store (&stopping, true);
  for (size_t i = 0; i < vm_count; i++) {
    struct vr_vm *vm = vms[i].vm;
    uint64_t bytes = 0;
    int err;

    if (!vms[i].started)
      continue;
    pthread_join (vms[i].applier, NULL);
    pthread_join (vms[i].syncer, NULL);
    do
      err = vr_vm_apply (vm, APPLY_BYTES, &bytes);
    while (err == 0 && bytes > 0);
    if (err == 0)
      err = vr_vm_checkpoint (vm, 1);
    if (err < 0)
      say_apply_error (vm, err);
  }
}

static void
vmrep_backup_unload (void)
{
  for (size_t i = 0; i < vm_count; i++)
    vr_vm_close (vms[i].vm);
  free (dir);
}

/* ---- Exports ------------------------------------------------------------ */

/* "VM/DISK" or "VM/DISK@SPEC"; *spec is NULL without one. */
static int
split_export (const char *name, char vm[VR_NAME_SIZE],
              char disk[VR_NAME_SIZE], const char **spec)
{
  const char *slash = strchr (name, '/');
  const char *at = slash ? strchr (slash, '@') : NULL;
  const char *end = at ? at : name + strlen (name);

  if (slash == NULL || slash - name >= VR_NAME_SIZE
      || end - slash - 1 >= VR_NAME_SIZE)
    return -EINVAL;
  snprintf (vm, VR_NAME_SIZE, "%.*s", (int) (slash - name), name);
  snprintf (disk, VR_NAME_SIZE, "%.*s", (int) (end - slash - 1), slash + 1);
  *spec = at ? at + 1 : NULL;
  return vr_name_ok (vm) && vr_name_ok (disk) ? 0 : -EINVAL;
}

/* A member whose image can be shown. */
static int
open_view (struct handle *h, const char *spec)
{
  struct vr_vm_member *m;
  int err;

  if (h->vm == NULL) {
    nbdkit_error ("there is no VM %s here", h->vm_name);
    return plugin_errno (-EINVAL);
  }
  if (h->vm->damaged.code) {
    nbdkit_error ("VM %s: %s", h->vm_name, h->vm->damaged.text);
    return plugin_errno (-EIO);
  }
  m = vr_vm_find (h->vm, h->disk);
  if (m == NULL) {
    nbdkit_error ("VM %s has no disk %s here", h->vm_name, h->disk);
    return plugin_errno (-EINVAL);
  }
  if (!vr_vm_is_whole (m)) {
    nbdkit_error ("%s/%s: its first copy is not finished", h->vm_name,
                  h->disk);
    return plugin_errno (-EIO);
  }
  err = vr_vm_settle (h->vm);
  if (err < 0) {
    nbdkit_error ("VM %s: %s", h->vm_name, strerror (-err));
    return plugin_errno (err);
  }
  return view_export_open (&h->view, &m->img, spec);
}

static void *
vmrep_backup_open (int readonly)
{
  const char *name = nbdkit_export_name ();
  const char *spec;
  struct handle *h = calloc (1, sizeof *h);

  (void) readonly;
  if (h == NULL || name == NULL)
    goto err;
  if (split_export (name, h->vm_name, h->disk, &spec) < 0) {
    nbdkit_error ("export '%s': expected VM/DISK or VM/DISK@committed", name);
    goto err;
  }
  h->vm = find_vm (h->vm_name, false);
  h->is_view = spec != NULL;
  if (h->is_view && open_view (h, spec) < 0)
    goto err;
  pthread_mutex_init (&h->mutex, NULL);
  return h;

 err:
  free (h);
  return NULL;
}

static void
vmrep_backup_close (void *handle)
{
  struct handle *h = handle;

  if (h->is_view)
    view_export_close (&h->view);
  else if (h->member)
    vr_vm_goodbye (h->member, h->session);
  pthread_mutex_destroy (&h->mutex);
  free (h);
}

static int
list_vm (struct vr_vm *vm, struct nbdkit_exports *exports)
{
  char name[2 * VR_NAME_SIZE + 16];

  for (size_t i = 0; i < VR_MEMBERS_MAX; i++) {
    const char *disk = vm->page.member[i].name;

    if (disk[0] == 0)
      continue;
    snprintf (name, sizeof name, "%s/%s", vm->name, disk);
    if (nbdkit_add_export (exports, name, "log") < 0)
      return -1;
    snprintf (name, sizeof name, "%s/%s@committed", vm->name, disk);
    if (nbdkit_add_export (exports, name, "the disk at the last commit") < 0)
      return -1;
  }
  return 0;
}

static int
vmrep_backup_list_exports (int readonly, int is_tls,
                           struct nbdkit_exports *exports)
{
  struct vr_vm *vm;

  (void) readonly;
  (void) is_tls;
  for (size_t i = 0; (vm = vm_at (i)) != NULL; i++) {
    int r;

    pthread_mutex_lock (&vm->mutex);
    r = list_vm (vm, exports);
    pthread_mutex_unlock (&vm->mutex);
    if (r < 0)
      return -1;
  }
  return 0;
}

static int64_t
vmrep_backup_get_size (void *handle)
{
  struct handle *h = handle;

  return h->is_view ? (int64_t) view_export_size (&h->view)
                    : (int64_t) VR_LSN_MAX;
}

static int
vmrep_backup_can_write (void *handle)
{
  return !((struct handle *) handle)->is_view;
}

/* A log has one writer and its own FUA; nothing else applies to it. */
static int
vmrep_backup_can_fua (void *handle)
{
  (void) handle;
  return NBDKIT_FUA_NATIVE;
}

static int
vmrep_backup_no (void *handle)
{
  (void) handle;
  return 0;
}

static int
vmrep_backup_can_multi_conn (void *handle)
{
  return ((struct handle *) handle)->is_view;
}

/* ---- Requests ----------------------------------------------------------- */

/* Report a refusal: to our log, to this connection's status, as an errno. */
static int
refused (struct handle *h, int err, const struct vr_refused *why)
{
  pthread_mutex_lock (&h->mutex);
  h->refused = *why;
  pthread_mutex_unlock (&h->mutex);
  if (why->code)
    nbdkit_error ("%s/%s: %s", h->vm_name, h->disk, why->text);
  return plugin_errno (err);
}

static int
read_status (struct handle *h, void *buf, uint32_t count, uint64_t offset)
{
  struct vr_status status;
  struct vr_refused why;

  if (offset + count > sizeof status) {
    nbdkit_error ("%s/%s: only the status block, the first %zu bytes, can be "
                  "read from a log",
                  h->vm_name, h->disk, sizeof status);
    return plugin_errno (-EINVAL);
  }
  pthread_mutex_lock (&h->mutex);
  why = h->refused;
  pthread_mutex_unlock (&h->mutex);
  if (h->vm)
    vr_vm_status (h->vm, h->disk, &why, &status);
  else
    vr_status_empty (h->vm_name, h->disk, &why, &status);
  memcpy (buf, (const char *) &status + offset, count);
  return 0;
}

static int
vmrep_backup_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
                    uint32_t flags)
{
  struct handle *h = handle;

  (void) flags;
  return h->is_view ? view_export_read (&h->view, buf, count, offset)
                    : read_status (h, buf, count, offset);
}

static int
take_hello (struct handle *h, const void *buf, uint32_t count)
{
  struct vr_hello hello;
  struct vr_vm_member *m = NULL;
  struct vr_refused why = { 0 };
  int err;

  if (count != sizeof hello) {
    why.code = VR_REFUSED_FORMAT;
    snprintf (why.text, sizeof why.text, "hello of %u bytes", count);
    return refused (h, -EINVAL, &why);
  }
  memcpy (&hello, buf, sizeof hello);
  pthread_mutex_lock (&h->mutex);
  m = h->member;
  pthread_mutex_unlock (&h->mutex);
  err = vr_hello_check (&hello, h->vm_name, h->disk, &why);
  if (err < 0)
    return refused (h, err, &why);
  if (m && hello.mode == VR_HELLO_COPIED) {
    err = vr_vm_copied (m, h->session);
    return err < 0 ? plugin_errno (err) : 0;
  }
  if (h->vm == NULL)
    h->vm = find_vm (h->vm_name, hello.mode == VR_HELLO_CREATE);
  if (h->vm == NULL) {
    why.code = hello.mode == VR_HELLO_CREATE ? VR_REFUSED_IO
                                             : VR_REFUSED_HISTORY;
    snprintf (why.text, sizeof why.text, "%s",
              why.code == VR_REFUSED_IO ? "the VM cannot be created here"
                                        : "there is no log to resume here");
    return refused (h, why.code == VR_REFUSED_IO ? -EIO : -EPERM, &why);
  }
  err = vr_vm_hello (h->vm, h->disk, &hello, &m, &why);
  if (err < 0)
    return refused (h, err, &why);
  pthread_mutex_lock (&h->mutex);
  h->member = m;
  h->session = hello.session;
  h->refused.code = VR_REFUSED_NOTHING;
  pthread_mutex_unlock (&h->mutex);
  nbdkit_debug ("%s/%s: %s writes from LSN %llu", h->vm_name, h->disk,
                hello.node, (unsigned long long) hello.lsn);
  return 0;
}

static int
vmrep_backup_pwrite (void *handle, const void *buf, uint32_t count,
                     uint64_t offset, uint32_t flags)
{
  struct handle *h = handle;
  struct vr_vm_member *m;
  struct vr_refused why = { 0 };
  uint64_t session;
  int err;

  (void) flags; /* what holds a seal waits for its commit anyway */
  if (offset == 0)
    return take_hello (h, buf, count);
  pthread_mutex_lock (&h->mutex);
  m = h->member;
  session = h->session;
  pthread_mutex_unlock (&h->mutex);
  if (m == NULL) {
    why.code = VR_REFUSED_FORMAT;
    snprintf (why.text, sizeof why.text, "log bytes before a hello");
    return refused (h, -EINVAL, &why);
  }
  err = vr_vm_write (m, session, offset, buf, count, h, &why);
  if (err == 0)
    return 0;
  if (err == -ESHUTDOWN)
    leave_one_by_one ();
  return refused (h, err, &why);
}

/* Never needed: a commit says more.  But a client may send one. */
static int
vmrep_backup_flush (void *handle, uint32_t flags)
{
  struct handle *h = handle;
  int err = 0;

  (void) flags;
  if (h->member)
    err = vr_log_sync (h->member->log, vr_log_durable (h->member->log));
  return err < 0 ? plugin_errno (err) : 0;
}

static struct nbdkit_plugin plugin = {
  .name = "vmrep-backup",
  .longname = "vmrep backup: replicated logs of many VMs",
  .version = VMREP_VERSION,
  .description = "Keeps the logs of protected VMs and applies committed "
                 "epochs to their images.",
  .load = plugin_bound_memory,
  .config = vmrep_backup_config,
  .config_complete = vmrep_backup_config_complete,
  .config_help = vmrep_backup_config_help,
  .magic_config_key = "dir",
  .dump_plugin = vmrep_backup_dump_plugin,
  .get_ready = vmrep_backup_get_ready,
  .after_fork = vmrep_backup_after_fork,
  .cleanup = vmrep_backup_cleanup,
  .unload = vmrep_backup_unload,
  .list_exports = vmrep_backup_list_exports,
  .open = vmrep_backup_open,
  .close = vmrep_backup_close,
  .get_size = vmrep_backup_get_size,
  .can_write = vmrep_backup_can_write,
  .can_flush = vmrep_backup_can_write,
  .can_trim = vmrep_backup_no,
  .can_zero = vmrep_backup_no,
  .can_fua = vmrep_backup_can_fua,
  .can_multi_conn = vmrep_backup_can_multi_conn,
  .pread = vmrep_backup_pread,
  .pwrite = vmrep_backup_pwrite,
  .flush = vmrep_backup_flush,
  .errno_is_preserved = 1,
};

NBDKIT_REGISTER_PLUGIN (plugin)
