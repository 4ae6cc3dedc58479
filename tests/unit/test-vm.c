/* SPDX-License-Identifier: BSD-3-Clause */
/* journal/vm.h and ship.h: a backup, spoken to by primaries good and bad. */
#include "util.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "journal/disk.h"
#include "journal/ship.h"
#include "journal/vm.h"

#define DISK 40000
#define SEGMENT 8192
#define TIMEOUT_NS UINT64_C (2000000000)

static _Atomic bool waiting_allowed;

static bool
keep_waiting (void *opaque)
{
  (void) opaque;
  return atomic_load (&waiting_allowed);
}

/* ---- A primary and a backup --------------------------------------------- */

/* One disk's primary, with a folder of its own. */
struct disk {
  char name[16], image[40], journal[40];
  struct vr_disk *d;
  uint8_t model[DISK];
  struct vr_vm_member *m;
  uint64_t session;
  struct vr_ship_cursor cursor;
};

struct rig {
  struct env *e;
  uint64_t rng;
  struct vr_epoch *epoch;
  struct vr_vm *vm;
  struct vr_vm_config config;
  struct disk disk[2];
};

static void
open_vm (struct rig *r)
{
  char message[512];

  if (vr_vm_open (r->e->io, &r->config, &r->vm, message, sizeof message) < 0)
    fail_msg ("%s", message);
}

static void
open_disk (struct rig *r, struct disk *d)
{
  struct vr_disk_config c = { .vm = "vm", .disk = d->name,
                              .cache_segments = 3, .image = d->image,
                              .journal = d->journal };
  char message[512];

  if (vr_disk_open (r->e->io, &c, &d->d, message, sizeof message) < 0)
    fail_msg ("%s", message);
  d->d->keep_waiting = keep_waiting;
  assert_int_equal (vr_disk_start (d->d, r->epoch), 0);
}

static void
add_disk (struct rig *r, unsigned i)
{
  struct vr_log_config c = small_config (DISK, SEGMENT, 16);
  struct disk *d = &r->disk[i];

  snprintf (d->name, sizeof d->name, "disk%u", i);
  snprintf (d->image, sizeof d->image, "disk%u.image", i);
  snprintf (d->journal, sizeof d->journal, "disk%u.journal", i);
  fill_random (&r->rng, d->model, DISK);
  write_file (r->e->io, d->image, d->model, DISK);
  c.disk = d->name;
  assert_int_equal (vr_log_create (r->e->io, d->journal, &c), 0);
  open_disk (r, d);
}

static struct rig *
new_rig (void **state, unsigned disks)
{
  const uint8_t id[16] = { 1, 2, 3 };
  struct rig *r = calloc (1, sizeof *r);

  r->e = *state;
  r->rng = seeded (1);
  r->config = (struct vr_vm_config){ .dir = ".", .name = "vm",
                                     .create = true,
                                     .writer_timeout_ns = TIMEOUT_NS,
                                     .keep_waiting = keep_waiting };
  atomic_store (&waiting_allowed, false);
  assert_int_equal (vr_epoch_new_private ("vm", id, 1, &r->epoch), 0);
  open_vm (r);
  for (unsigned i = 0; i < disks; i++)
    add_disk (r, i);
  return r;
}

static void
disconnect (struct disk *d)
{
  if (d->m == NULL)
    return;
  vr_log_ship_cursor_end (d->d->log, &d->cursor);
  vr_vm_goodbye (d->m, d->session);
  d->m = NULL;
}

static void
restart_vm (struct rig *r)
{
  for (int i = 0; i < 2; i++)
    disconnect (&r->disk[i]);
  vr_vm_close (r->vm);
  open_vm (r);
}

static void
end_rig (struct rig *r)
{
  for (int i = 0; i < 2; i++) {
    disconnect (&r->disk[i]);
    vr_disk_close (r->disk[i].d);
  }
  vr_vm_close (r->vm);
  vr_epoch_close (r->epoch);
  free (r);
}

static struct vr_status
status_of (struct rig *r, const char *disk)
{
  const struct vr_refused none = { 0 };
  struct vr_status s;

  vr_vm_status (r->vm, disk, &none, &s);
  assert_true (vr_block_ok (&s, VR_STATUS_MAGIC));
  return s;
}

/* ---- Conversation ------------------------------------------------------- */

/* A hello as this primary would say it now. */
static struct vr_hello
make_hello (struct rig *r, struct disk *d, struct vr_ship_plan *plan)
{
  struct vr_status status = status_of (r, d->name);
  struct vr_hello h;

  assert_int_equal (vr_ship_plan (d->d->log, &status, plan), 0);
  if (plan->plan == VR_PLAN_FENCED || plan->plan == VR_PLAN_REFUSED)
    fail_msg ("%s", plan->why);
  assert_int_equal (vr_ship_hello (d->d->log, plan, "node",
                                   next_random (&r->rng) | 1, &h),
                    0);
  return h;
}

static enum vr_plan
connect_disk (struct rig *r, struct disk *d)
{
  struct vr_refused refused;
  struct vr_ship_plan plan;
  struct vr_hello h = make_hello (r, d, &plan);

  if (vr_vm_hello (r->vm, d->name, &h, &d->m, &refused) < 0)
    fail_msg ("%s", refused.text);
  assert_int_equal (refused.code, VR_REFUSED_NOTHING);
  d->session = h.session;
  d->cursor = (struct vr_ship_cursor){ .at = plan.start };
  return plan.plan;
}

static void
write_some (struct rig *r, struct disk *d)
{
  const uint64_t n = 1 + below (&r->rng, 3000);
  const uint64_t offset = below (&r->rng, DISK - n);

  fill_random (&r->rng, d->model + offset, n);
  assert_int_equal (vr_disk_write (d->d, d->model + offset, n, offset), 0);
}

static uint64_t
cut (struct rig *r)
{
  const uint64_t n = vr_epoch_current (r->epoch);

  vr_epoch_cut (r->epoch, n, 0);
  return n;
}

static void
seal (struct disk *d)
{
  uint64_t lsn;

  assert_int_equal (vr_log_seal (d->d->log, &lsn), 0);
  assert_int_equal (vr_log_sync (d->d->log, vr_log_head (d->d->log)), 0);
}

/* Everything there is; the last result. */
static int
ship (struct disk *d)
{
  struct vr_refused refused;
  struct vr_ship_batch b;
  int err = 0;

  for (;;) {
    assert_int_equal (vr_log_ship_batch (d->d->log, &d->cursor, &b), 0);
    if (b.size == 0)
      return err;
    err = vr_vm_write (d->m, d->session, b.lsn, b.data, b.size, NULL,
                       &refused);
    vr_log_put_segment (d->d->log, b.segment);
    if (err < 0 && err != -ESHUTDOWN)
      fail_msg ("%s", refused.text);
  }
}

static void
copy_all (struct rig *r, struct disk *d)
{
  static uint8_t buf[5000];

  for (uint64_t at = 0; at < DISK; at += sizeof buf)
    assert_int_equal (vr_disk_copy (d->d, buf, sizeof buf, at), 0);
  cut (r);
  seal (d);
}

/* Connect and copy until the backup has this disk. */
static void
protect (struct rig *r, struct disk *d)
{
  assert_int_equal (connect_disk (r, d), VR_PLAN_CREATE);
  copy_all (r, d);
  ship (d);
  assert_int_equal (vr_vm_copied (d->m, d->session), 0);
}

static void
apply_all (struct rig *r)
{
  uint64_t n;

  do
    assert_int_equal (vr_vm_apply (r->vm, 0, &n), 0);
  while (n > 0);
  assert_int_equal (vr_vm_checkpoint (r->vm, 0), 0);
}

static void
check_image (struct rig *r, struct disk *d, const uint8_t *want)
{
  char path[64];
  uint64_t size;
  uint8_t *got;

  snprintf (path, sizeof path, "./vm/%s.img", d->name);
  got = read_file (r->e->io, path, &size);
  assert_int_equal (size, DISK);
  assert_memory_equal (got, want, DISK);
  free (got);
}

/* ---- Hello -------------------------------------------------------------- */

static void
expect_hello (struct rig *r, struct vr_hello *h, int want,
              enum vr_refusal code)
{
  struct vr_vm_member *m = NULL;
  struct vr_refused refused;

  vr_block_seal (h);
  assert_int_equal (vr_vm_hello (r->vm, "disk0", h, &m, &refused), want);
  assert_int_equal (refused.code, code);
  assert_true ((want == 0) == (refused.text[0] == 0));
}

static void
test_first_status (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct vr_status s = status_of (r, "disk0");
  const struct vr_refused why = { VR_REFUSED_IO, "text" };

  assert_string_equal (s.vm, "vm");
  assert_string_equal (s.disk, "disk0");
  assert_int_equal (s.next_lsn, 0);
  assert_int_equal (s.members, 0);
  protect (r, &r->disk[0]);
  s = status_of (r, "disk0");
  assert_int_equal (s.members, 1);
  assert_int_equal (s.flags, VR_LOG_BACKUP);
  assert_int_equal (s.disk_size, DISK);
  assert_int_equal (s.session, r->disk[0].session);
  assert_int_equal (s.next_lsn, vr_log_head (r->disk[0].d->log));
  assert_int_equal (s.committed_epoch, s.sealed_epoch);
  vr_status_empty ("a", "b", &why, &s);
  assert_true (vr_block_ok (&s, VR_STATUS_MAGIC));
  assert_int_equal (s.refusal, VR_REFUSED_IO);
  assert_string_equal (s.refusal_text, "text");
  end_rig (r);
}

static void
test_hello_malformed (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct vr_ship_plan plan;
  const struct vr_hello good = make_hello (r, &r->disk[0], &plan);
  struct vr_vm_member *m = NULL;
  struct vr_refused refused;
  struct vr_hello h;

#define BAD(change)                                                           \
  do {                                                                        \
    h = good;                                                                 \
    change;                                                                   \
    expect_hello (r, &h, -EINVAL, VR_REFUSED_FORMAT);                         \
  } while (0)

  BAD (h.magic[0] = 'x');
  BAD (h.version = 2);
  BAD (h.mode = 0);
  BAD (h.mode = 9);
  BAD (strcpy (h.vm, "other"));
  BAD (strcpy (h.disk, "other"));
  BAD (memset (h.vm, 'x', sizeof h.vm));
  BAD (memset (h.node, 'x', sizeof h.node));
  BAD (h.session = 0);
  BAD (h.lsn = VR_LSN_MAX);
  BAD (h.lsn = 0);
  BAD (h.lsn += 64);
  BAD (h.disk_size = 0);
  BAD (h.disk_size = UINT64_MAX);
  BAD (h.segment_size = 0);
  BAD (h.segment_size = 12288);
  BAD (h.segment_size = UINT64_C (1) << 40);
  BAD (h.segment_count = 0);
  BAD (h.segment_count = UINT64_MAX);
  BAD (h.generation = UINT64_MAX);
  BAD (h.reserved[100] = 1);
#undef BAD
  h = good;
  h.lsn ^= 64; /* after the checksum was made */
  assert_int_equal (vr_vm_hello (r->vm, "disk0", &h, &m, &refused), -EINVAL);
  /* Nothing came of all this. */
  assert_null (vr_vm_find (r->vm, "disk0"));
  assert_int_equal (status_of (r, "disk0").members, 0);
  h = good;
  h.mode = VR_HELLO_RESUME;
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  h = good;
  expect_hello (r, &h, 0, VR_REFUSED_NOTHING);
  end_rig (r);
}

static void
test_hello_refused (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct vr_ship_plan plan;
  struct vr_hello good, h;

  protect (r, d);
  disconnect (d);
  good = make_hello (r, d, &plan);
  assert_int_equal (plan.plan, VR_PLAN_RESUME);

  h = good;
  h.vm_id[0] ^= 1;
  expect_hello (r, &h, -EPERM, VR_REFUSED_VM);
  h = good;
  h.disk_size++;
  expect_hello (r, &h, -EINVAL, VR_REFUSED_SIZE);
  h = good;
  h.segment_size *= 2;
  expect_hello (r, &h, -EINVAL, VR_REFUSED_SIZE);
  h = good;
  h.log_id[0] ^= 1;
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  h = good;
  h.chain ^= 1;
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  h = good;
  h.lsn += 64;
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  h = good;
  h.lsn = SEGMENT; /* before the commit point */
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  h = good;
  h.mode = VR_HELLO_CREATE; /* over a complete disk */
  h.lsn = SEGMENT;
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  h = good;
  h.generation = 0;
  expect_hello (r, &h, -ESHUTDOWN, VR_REFUSED_GENERATION);
  h = good;
  expect_hello (r, &h, 0, VR_REFUSED_NOTHING);
  end_rig (r);
}

/* Refused by these, the log is as it was. */
static void
test_second_writer (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct vr_ship_plan plan;
  struct vr_refused refused;
  struct vr_hello h;

  protect (r, d);
  h = make_hello (r, d, &plan);
  expect_hello (r, &h, -EPERM, VR_REFUSED_WRITER);
  /* Silent for too long, */
  vr_io_sim_sleep (r->e->io, TIMEOUT_NS);
  h.session += 2;
  expect_hello (r, &h, 0, VR_REFUSED_NOTHING);
  assert_int_equal (vr_vm_write (d->m, d->session, h.lsn, "x", 1, NULL,
                                 &refused),
                    -ESHUTDOWN);
  assert_int_equal (vr_vm_copied (d->m, d->session), -ESHUTDOWN);
  /* or of an older generation. */
  h.session += 2;
  h.generation++;
  expect_hello (r, &h, 0, VR_REFUSED_NOTHING);
  assert_int_equal (status_of (r, "disk0").session, h.session);
  assert_int_equal (status_of (r, "disk0").generation, 2);
  /* The older one's farewell says nothing any more. */
  vr_vm_goodbye (d->m, d->session);
  assert_int_equal (status_of (r, "disk0").session, h.session);
  vr_vm_goodbye (d->m, h.session);
  assert_int_equal (status_of (r, "disk0").session, 0);
  h.session += 2;
  h.generation = 1;
  expect_hello (r, &h, -ESHUTDOWN, VR_REFUSED_GENERATION);
  restart_vm (r);
  expect_hello (r, &h, -ESHUTDOWN, VR_REFUSED_GENERATION);
  end_rig (r);
}

static void
test_write_refused (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct vr_refused refused;
  static uint8_t big[VR_SHIP_MAX + 1];
  uint64_t head;

  protect (r, d);
  head = vr_log_head (d->m->log);
#define BAD(lsn, buf, n)                                                      \
  do {                                                                        \
    assert_int_equal (vr_vm_write (d->m, d->session, lsn, buf, n, NULL,       \
                                   &refused),                                 \
                      -EINVAL);                                               \
    assert_int_equal (refused.code, VR_REFUSED_FORMAT);                       \
    assert_int_equal (vr_log_head (d->m->log), head);                         \
  } while (0)
  BAD (head, big, 0);
  BAD (head, big, sizeof big);
  BAD (head, big, 64);
  BAD (head, big, 63);
  BAD (head, big, VR_SHIP_MAX);
  BAD (head - 64, big, 64);
  BAD (64, big, 64);
#undef BAD
  /* What can still come is waited for, here in vain. */
  assert_int_equal (vr_vm_write (d->m, d->session, head + 64, big, 64, NULL,
                                 &refused),
                    -ESHUTDOWN);
  write_some (r, d);
  cut (r);
  seal (d);
  assert_int_equal (ship (d), 0);
  end_rig (r);
}

static void
test_io_error (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct vr_refused refused;
  struct vr_ship_batch b;
  struct vr_hello h;
  struct vr_ship_plan plan;

  h = make_hello (r, d, &plan);
  vr_io_sim_fail (r->e->io, VR_SIM_WRITE, 1, -ENOSPC, true);
  expect_hello (r, &h, -ENOSPC, VR_REFUSED_IO);
  vr_io_sim_fail (r->e->io, 0, 0, 0, false);
  assert_null (vr_vm_find (r->vm, "disk0"));
  protect (r, d);
  write_some (r, d);
  cut (r);
  seal (d);
  assert_int_equal (vr_log_ship_batch (d->d->log, &d->cursor, &b), 0);
  vr_io_sim_fail (r->e->io, VR_SIM_SYNC, 1, -EIO, false);
  assert_int_equal (vr_vm_write (d->m, d->session, b.lsn, b.data, b.size,
                                 NULL, &refused),
                    -EIO);
  assert_int_equal (refused.code, VR_REFUSED_IO);
  vr_log_put_segment (d->d->log, b.segment);
  end_rig (r);
}

/* ---- Commit ------------------------------------------------------------- */

struct shipping {
  struct disk *d;
  atomic_bool done;
  int result;
};

static void *
ship_thread (void *opaque)
{
  struct shipping *s = opaque;

  s->result = ship (s->d);
  atomic_store (&s->done, true);
  return NULL;
}

/* The first disk's seal is answered when the second one's is there. */
static void
test_two_members (void **state)
{
  struct rig *r = new_rig (state, 2);
  struct disk *a = &r->disk[0], *b = &r->disk[1];
  struct shipping s = { .d = a };
  uint64_t before, epoch;
  pthread_t t;

  protect (r, a);
  protect (r, b);
  seal (a);
  ship (a);
  before = status_of (r, "disk0").committed_epoch;
  write_some (r, a);
  write_some (r, b);
  epoch = cut (r);
  seal (a);
  seal (b);
  atomic_store (&waiting_allowed, true);
  pthread_create (&t, NULL, ship_thread, &s);
  while (status_of (r, "disk0").sealed_epoch < epoch)
    usleep (1000);
  usleep (20000);
  assert_false (atomic_load (&s.done));
  assert_int_equal (status_of (r, "disk0").committed_epoch, before);
  assert_string_equal (status_of (r, "disk0").waiting_for, "disk1");
  assert_int_equal (ship (b), 0);
  pthread_join (t, NULL);
  assert_int_equal (s.result, 0);
  assert_int_equal (status_of (r, "disk1").committed_epoch, epoch);
  assert_string_equal (status_of (r, "disk0").waiting_for, "");
  assert_int_equal (vr_vm_wait_committed (r->vm, epoch, 0), epoch);
  apply_all (r);
  check_image (r, a, a->model);
  check_image (r, b, b->model);
  end_rig (r);
}

/* Who waits for other members lets go when told to. */
static void
test_give_up_waiting (void **state)
{
  struct rig *r = new_rig (state, 2);
  struct disk *a = &r->disk[0], *b = &r->disk[1];
  uint64_t epoch;

  protect (r, a);
  protect (r, b);
  epoch = cut (r);
  seal (a);
  assert_int_equal (ship (a), -ESHUTDOWN);
  assert_true (status_of (r, "disk0").committed_epoch < epoch);
  /* It counts all the same. */
  seal (b);
  assert_int_equal (ship (b), 0);
  assert_int_equal (status_of (r, "disk0").committed_epoch, epoch);
  end_rig (r);
}

/* Late batches wait for the earlier ones. */
struct batch {
  struct disk *d;
  struct vr_ship_batch b;
  int result;
};

static void *
write_thread (void *opaque)
{
  struct batch *x = opaque;
  struct vr_refused refused;

  x->result = vr_vm_write (x->d->m, x->d->session, x->b.lsn, x->b.data,
                           x->b.size, NULL, &refused);
  return NULL;
}

static void
test_out_of_order (void **state)
{
  enum { BATCHES = 5 };
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct batch x[BATCHES];
  pthread_t t[BATCHES];
  uint64_t epoch;

  protect (r, d);
  atomic_store (&waiting_allowed, true);
  while (vr_log_head (d->d->log) < d->cursor.at.lsn + BATCHES * SEGMENT)
    write_some (r, d);
  epoch = cut (r);
  seal (d);
  for (int i = 0; i < BATCHES; i++) {
    x[i] = (struct batch){ .d = d };
    assert_int_equal (vr_log_ship_batch (d->d->log, &d->cursor, &x[i].b), 0);
    assert_true (x[i].b.size > 0);
  }
  for (int i = BATCHES - 1; i >= 0; i--) {
    pthread_create (&t[i], NULL, write_thread, &x[i]);
    usleep (2000);
  }
  for (int i = 0; i < BATCHES; i++) {
    pthread_join (t[i], NULL);
    assert_int_equal (x[i].result, 0);
    vr_log_put_segment (d->d->log, x[i].b.segment);
  }
  ship (d);
  assert_int_equal (status_of (r, "disk0").committed_epoch, epoch);
  end_rig (r);
}

/* With sync=memory the answer comes first, images follow what is durable. */
static void
test_sync_memory (void **state)
{
  static const struct vr_sim_crash lose = { .drop = 256 };
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  uint8_t before[DISK];
  uint64_t epoch, first;

  vr_vm_close (r->vm);
  r->config.sync_memory = true;
  open_vm (r);
  protect (r, d);
  apply_all (r);
  first = status_of (r, "disk0").committed_epoch;
  memcpy (before, d->model, DISK);
  check_image (r, d, before);
  write_some (r, d);
  epoch = cut (r);
  seal (d);
  assert_int_equal (ship (d), 0);
  assert_int_equal (status_of (r, "disk0").committed_epoch, epoch);
  /* Lose it: back at the epoch before, whole. */
  disconnect (d);
  vr_vm_close (r->vm);
  vr_disk_close (d->d);
  vr_io_sim_crash (r->e->io, &lose);
  open_vm (r);
  assert_int_equal (status_of (r, "disk0").committed_epoch, first);
  apply_all (r);
  check_image (r, d, before);
  open_disk (r, d);
  end_rig (r);
}

/* ---- Restart, resume, recreate ------------------------------------------ */

static void
test_restart (void **state)
{
  static const struct vr_sim_crash lose = { .drop = 256 };
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct vr_status before, after;

  protect (r, d);
  for (int i = 0; i < 10; i++) {
    write_some (r, d);
    cut (r);
    seal (d);
    assert_int_equal (ship (d), 0);
    if (i % 3 == 0)
      apply_all (r);
  }
  before = status_of (r, "disk0");
  disconnect (d);
  vr_vm_close (r->vm);
  vr_disk_close (d->d);
  vr_io_sim_crash (r->e->io, &lose);
  open_vm (r);
  after = status_of (r, "disk0");
  assert_int_equal (after.committed_epoch, before.committed_epoch);
  assert_int_equal (after.committed_lsn, before.committed_lsn);
  assert_int_equal (after.next_lsn, before.next_lsn);
  apply_all (r);
  check_image (r, d, d->model);
  open_disk (r, d);
  assert_int_equal (connect_disk (r, d), VR_PLAN_RESUME);
  write_some (r, d);
  cut (r);
  seal (d);
  assert_int_equal (ship (d), 0);
  apply_all (r);
  check_image (r, d, d->model);
  end_rig (r);
}

/* The primary lost what it had not synced; the backup forgets it too. */
static void
test_resume_drops_tail (void **state)
{
  static const struct vr_sim_crash lose = { .drop = 256 };
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  uint8_t synced[DISK];
  uint64_t head;

  protect (r, d);
  memcpy (synced, d->model, DISK);
  for (int i = 0; i < 20; i++)
    write_some (r, d);
  ship (d);
  head = vr_log_head (d->m->log);
  disconnect (d);
  vr_vm_close (r->vm);
  vr_disk_close (d->d);
  vr_io_sim_crash (r->e->io, &lose);
  open_vm (r);
  memcpy (d->model, synced, DISK);
  open_disk (r, d);
  assert_int_equal (connect_disk (r, d), VR_PLAN_RESUME);
  assert_true (vr_log_head (d->m->log) < head);
  write_some (r, d);
  cut (r);
  seal (d);
  assert_int_equal (ship (d), 0);
  restart_vm (r);
  apply_all (r);
  check_image (r, d, d->model);
  end_rig (r);
}

/* A member cut back behind a seal no longer counts as having it. */
static void
test_resume_drops_seal (void **state)
{
  struct rig *r = new_rig (state, 2);
  struct disk *a = &r->disk[0], *b = &r->disk[1];
  struct vr_ship_plan plan;
  struct vr_refused refused;
  struct vr_status s;
  struct vr_hello h;
  uint64_t committed, epoch;

  protect (r, a);
  protect (r, b);
  seal (a);
  ship (a);
  s = status_of (r, "disk0");
  committed = s.committed_epoch;
  epoch = cut (r);
  seal (a);
  assert_int_equal (ship (a), -ESHUTDOWN); /* disk1 has not sealed yet */
  disconnect (a);
  h = make_hello (r, a, &plan);
  h.lsn = s.committed_lsn;
  h.chain = s.committed_chain;
  vr_block_seal (&h);
  assert_int_equal (vr_vm_hello (r->vm, "disk0", &h, &a->m, &refused), 0);
  assert_int_equal (status_of (r, "disk0").sealed_epoch, committed);
  seal (b);
  assert_int_equal (ship (b), -ESHUTDOWN);
  assert_int_equal (status_of (r, "disk1").committed_epoch, committed);
  a->session = h.session;
  a->cursor = (struct vr_ship_cursor){ .at = { h.lsn, h.chain } };
  assert_int_equal (ship (a), 0);
  assert_int_equal (status_of (r, "disk1").committed_epoch, epoch);
  end_rig (r);
}

/* A seal may be cut off on which the commit rests, when its log has nothing to
   lose by it; the commit stays. */
static void
test_resume_keeps_commit (void **state)
{
  struct rig *r = new_rig (state, 2);
  struct disk *a = &r->disk[0], *b = &r->disk[1];
  struct vr_ship_plan plan;
  struct vr_refused refused;
  struct vr_status s;
  struct vr_hello h;
  uint64_t epoch;

  protect (r, a);
  protect (r, b);
  seal (a);
  ship (a);
  epoch = cut (r);
  seal (b);
  ship (b);
  cut (r);
  seal (a); /* of a later epoch than b's, with nothing in between */
  ship (a);
  s = status_of (r, "disk0");
  assert_int_equal (s.committed_epoch, epoch);
  assert_true (s.committed_lsn < s.next_lsn);
  disconnect (a);
  h = make_hello (r, a, &plan);
  h.lsn = s.committed_lsn;
  h.chain = s.committed_chain;
  vr_block_seal (&h);
  assert_int_equal (vr_vm_hello (r->vm, "disk0", &h, &a->m, &refused), 0);
  a->m = NULL;
  restart_vm (r);
  assert_int_equal (r->vm->damaged.code, 0);
  assert_int_equal (status_of (r, "disk0").committed_epoch, epoch);
  end_rig (r);
}

/* A disk that joins later neither holds back nor sets back. */
static void
test_late_member (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *a = &r->disk[0], *b = &r->disk[1];
  uint64_t epoch;

  protect (r, a);
  epoch = status_of (r, "disk0").committed_epoch;
  add_disk (r, 1);
  assert_int_equal (connect_disk (r, b), VR_PLAN_CREATE);
  assert_int_equal (status_of (r, "disk1").committed_epoch, epoch);
  restart_vm (r);
  assert_int_equal (r->vm->damaged.code, 0);
  assert_int_equal (status_of (r, "disk1").committed_epoch, epoch);
  assert_int_equal (connect_disk (r, b), VR_PLAN_COPY);
  connect_disk (r, a);
  copy_all (r, b);
  seal (a);
  ship (a);
  ship (b);
  assert_int_equal (vr_vm_copied (b->m, b->session), 0);
  assert_true (status_of (r, "disk1").committed_epoch > epoch);
  apply_all (r);
  check_image (r, b, b->model);
  end_rig (r);
}

static void
new_journal (struct rig *r, struct disk *d)
{
  struct vr_log_config c = small_config (DISK, SEGMENT, 16);

  vr_disk_close (d->d);
  r->e->io->ops->unlink (r->e->io, d->journal);
  c.disk = d->name;
  c.epoch_limit = vr_epoch_current (r->epoch) + 1;
  assert_int_equal (vr_log_create (r->e->io, d->journal, &c), 0);
  open_disk (r, d);
}

/* A copy that another journal began is begun again, if it was not finished. */
static void
test_recreate (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  struct vr_status status;
  struct vr_ship_plan plan;
  struct vr_hello h;

  assert_int_equal (connect_disk (r, d), VR_PLAN_CREATE);
  write_some (r, d);
  cut (r);
  seal (d);
  assert_int_equal (ship (d), 0);
  assert_int_equal (vr_image_checkpoint (&d->d->img), 0);
  disconnect (d);
  new_journal (r, d);
  memset (d->model, 0, DISK);
  assert_int_equal (vr_disk_zero (d->d, DISK, 0, false), 0);
  /* One that cannot be: what is there stays. */
  h = make_hello (r, d, &plan);
  assert_int_equal (plan.plan, VR_PLAN_CREATE);
  h.segment_size = 3;
  h.lsn = 3;
  expect_hello (r, &h, -EINVAL, VR_REFUSED_FORMAT);
  h = make_hello (r, d, &plan);
  vr_io_sim_fail (r->e->io, VR_SIM_WRITE, 1, -ENOSPC, true);
  expect_hello (r, &h, -ENOSPC, VR_REFUSED_IO);
  vr_io_sim_fail (r->e->io, 0, 0, 0, false);
  assert_int_equal (r->vm->damaged.code, 0);
  apply_all (r);
  protect (r, d);
  apply_all (r);
  check_image (r, d, d->model);
  /* Finished, it is not given up for another journal. */
  disconnect (d);
  new_journal (r, d);
  status = status_of (r, "disk0");
  assert_int_equal (vr_ship_plan (d->d->log, &status, &plan), 0);
  assert_int_equal (plan.plan, VR_PLAN_REFUSED);
  assert_non_null (strstr (plan.why, "another journal"));
  end_rig (r);
}

/* Full before a backup was there: all of it is shipped. */
static void
test_join_when_full (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct disk *d = &r->disk[0];
  uint8_t buf[1000];
  uint64_t epoch;
  int err = 0;

  while (err == 0) {
    fill_random (&r->rng, buf, sizeof buf);
    err = vr_disk_write (d->d, buf, sizeof buf, 3000);
    if (err == 0)
      memcpy (d->model + 3000, buf, sizeof buf);
  }
  assert_int_equal (err, -ESHUTDOWN);
  epoch = cut (r);
  seal (d);
  assert_int_equal (connect_disk (r, d), VR_PLAN_CREATE);
  assert_int_equal (ship (d), 0);
  assert_int_equal (vr_log_commit (d->d->log, epoch), 0);
  assert_int_equal (vr_image_apply (&d->d->img, 0, &epoch), 0);
  assert_int_equal (vr_image_checkpoint (&d->d->img), 0);
  apply_all (r);
  copy_all (r, d);
  assert_int_equal (ship (d), 0);
  assert_int_equal (vr_vm_copied (d->m, d->session), 0);
  apply_all (r);
  check_image (r, d, d->model);
  end_rig (r);
}

/* ---- Promotion ---------------------------------------------------------- */

static void
test_promote (void **state)
{
  struct rig *r = new_rig (state, 2);
  struct disk *a = &r->disk[0], *b = &r->disk[1];
  uint8_t at_commit[2][DISK];
  struct vr_refused refused;
  struct vr_status status;
  struct vr_ship_plan plan;
  struct vr_hello h;

  assert_int_equal (vr_vm_promote (r->vm, &refused), -EPERM);
  assert_int_equal (refused.code, VR_REFUSED_HISTORY);
  protect (r, a);
  assert_int_equal (connect_disk (r, b), VR_PLAN_CREATE);
  assert_int_equal (vr_vm_promote (r->vm, &refused), -EPERM);
  assert_non_null (strstr (refused.text, "disk1"));
  copy_all (r, b);
  ship (b);
  assert_int_equal (vr_vm_copied (b->m, b->session), 0);
  seal (a);
  ship (a);
  memcpy (at_commit[0], a->model, DISK);
  memcpy (at_commit[1], b->model, DISK);
  write_some (r, a); /* sealed by one of the two only */
  write_some (r, b);
  cut (r);
  seal (a);
  ship (a);
  h = make_hello (r, a, &plan);
  restart_vm (r);
  for (int i = 0; i < 3; i++) {
    if (vr_vm_promote (r->vm, &refused) < 0)
      fail_msg ("%s", refused.text);
    check_image (r, a, at_commit[0]);
    check_image (r, b, at_commit[1]);
    assert_int_equal (status_of (r, "disk0").generation, 1 + (i >= 0));
    restart_vm (r);
  }
  expect_hello (r, &h, -ESHUTDOWN, VR_REFUSED_GENERATION);
  h.generation = status_of (r, "disk0").generation;
  expect_hello (r, &h, -ESHUTDOWN, VR_REFUSED_PROMOTED);
  h.mode = VR_HELLO_CREATE;
  h.lsn = SEGMENT;
  expect_hello (r, &h, -EPERM, VR_REFUSED_HISTORY);
  status = status_of (r, "disk0");
  assert_int_equal (vr_ship_plan (a->d->log, &status, &plan), 0);
  assert_int_equal (plan.plan, VR_PLAN_FENCED);
  end_rig (r);
}

/* ---- Damage and locks --------------------------------------------------- */

static void
expect_damaged (struct rig *r, const char *what)
{
  struct vr_refused refused;
  struct vr_ship_plan plan;
  struct vr_status s;
  struct vr_hello h;
  uint64_t n;

  open_vm (r);
  assert_int_equal (r->vm->damaged.code, VR_REFUSED_DAMAGE);
  if (strstr (r->vm->damaged.text, what) == NULL)
    fail_msg ("%s", r->vm->damaged.text);
  s = status_of (r, "disk0");
  assert_int_equal (s.refusal, VR_REFUSED_DAMAGE);
  assert_int_equal (vr_ship_plan (r->disk[0].d->log, &s, &plan), 0);
  assert_int_equal (plan.plan, VR_PLAN_REFUSED);
  plan.plan = VR_PLAN_RESUME;
  assert_int_equal (vr_ship_hello (r->disk[0].d->log, &plan, "n", 1, &h), 0);
  expect_hello (r, &h, -EIO, VR_REFUSED_DAMAGE);
  assert_int_equal (vr_vm_promote (r->vm, &refused), -EPERM);
  assert_int_equal (refused.code, VR_REFUSED_DAMAGE);
  /* Asked for in a moment of confusion: no harm. */
  vr_vm_apply (r->vm, 0, &n);
  vr_vm_checkpoint (r->vm, 0);
  vr_vm_close (r->vm);
  r->vm = NULL;
}

static void
test_damage (void **state)
{
  struct rig *r = new_rig (state, 2);
  struct vr_io *io = r->e->io;
  struct vr_file *f;

  protect (r, &r->disk[0]);
  protect (r, &r->disk[1]);
  seal (&r->disk[0]);
  ship (&r->disk[0]);
  assert_int_equal (vr_log_set_flags (r->disk[0].m->log, 0, 0), 0);
  disconnect (&r->disk[0]);
  disconnect (&r->disk[1]);
  vr_vm_close (r->vm);

  vr_io_sim_flip (io, "./vm/epoch", 300, 1);
  expect_damaged (r, "epoch: damaged");
  vr_io_sim_flip (io, "./vm/epoch", 300, 1);
  vr_io_sim_flip (io, "./vm/disk0.journal", VR_DATA_START + SEGMENT + 140, 1);
  expect_damaged (r, "disk0.journal: at byte");
  vr_io_sim_flip (io, "./vm/disk0.journal", VR_DATA_START + SEGMENT + 140, 1);
  assert_int_equal (io->ops->open (io, "./vm/disk1.img", 0, &f), 0);
  assert_int_equal (f->io->ops->truncate (f, DISK - 1), 0);
  expect_damaged (r, "disk1.img: has 39999 bytes");
  assert_int_equal (f->io->ops->truncate (f, DISK), 0);
  vr_close (f);
  assert_int_equal (io->ops->rename (io, "./vm/disk1.img", "./vm/x"), 0);
  r->disk[1].m = NULL;
  open_vm (r);
  assert_int_not_equal (r->vm->damaged.code, 0);
  end_rig (r);
}

static void
test_open_vm (void **state)
{
  struct rig *r = new_rig (state, 1);
  struct vr_vm_config c = r->config;
  char message[512];
  struct vr_vm *vm;

  assert_int_equal (vr_vm_open (r->e->io, &c, &vm, message, 512), -EAGAIN);
  assert_non_null (strstr (message, "in use"));
  c.create = false;
  c.name = "none";
  assert_int_equal (vr_vm_open (r->e->io, &c, &vm, message, 512), -ENOENT);
  assert_true (message[0] != 0);
  end_rig (r);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    ON_SIM (test_first_status),     ON_SIM (test_hello_malformed),
    ON_SIM (test_hello_refused),    ON_SIM (test_second_writer),
    ON_SIM (test_write_refused),    ON_SIM (test_io_error),
    ON_SIM (test_two_members),      ON_SIM (test_give_up_waiting),
    ON_SIM (test_out_of_order),     ON_SIM (test_sync_memory),
    ON_SIM (test_restart),          ON_SIM (test_resume_drops_tail),
    ON_SIM (test_resume_drops_seal), ON_SIM (test_late_member),
    ON_SIM (test_resume_keeps_commit),
    ON_SIM (test_recreate),         ON_SIM (test_join_when_full),
    ON_SIM (test_promote),          ON_SIM (test_damage),
    ON_SIM (test_open_vm),
  };

  return cmocka_run_group_tests_name ("vm", tests, NULL, NULL);
}
