/* SPDX-License-Identifier: BSD-3-Clause */
#include "util.h"

/* ---- Randomness --------------------------------------------------------- */

uint64_t
next_random (uint64_t *rng)
{
  *rng ^= *rng >> 12;
  *rng ^= *rng << 25;
  *rng ^= *rng >> 27;
  return *rng * UINT64_C (0x2545f4914f6cdd1d);
}

uint64_t
below (uint64_t *rng, uint64_t n)
{
  return (next_random (rng) >> 11) % n;
}

bool
chance (uint64_t *rng, unsigned percent)
{
  return below (rng, 100) < percent;
}

void
fill_random (uint64_t *rng, void *buf, size_t n)
{
  uint8_t *p = buf;

  for (size_t i = 0; i < n; i += 8) {
    const uint64_t x = next_random (rng);

    memcpy (p + i, &x, n - i < 8 ? n - i : 8);
  }
}

uint64_t
seeded (uint64_t seed)
{
  uint64_t rng = (seed + 1) * UINT64_C (0x9e3779b97f4a7c15);

  if (rng == 0)
    rng = 1;
  for (int i = 0; i < 8; i++)
    next_random (&rng);
  return rng;
}

uint64_t
env_number (const char *name, uint64_t otherwise)
{
  const char *value = getenv (name);

  return value ? strtoull (value, NULL, 0) : otherwise;
}

/* ---- Environments ------------------------------------------------------- */

int
setup_real (void **state)
{
  const char *tmp = getenv ("TMPDIR");
  struct env *e = calloc (1, sizeof *e);

  if (e == NULL)
    return -1;
  *state = e;
  e->io = vr_io_real ();
  if (snprintf (e->dir, sizeof e->dir, "%s/vmrep-unit-XXXXXX",
                tmp ? tmp : "/tmp")
      >= (int) sizeof e->dir)
    return -1;
  return mkdtemp (e->dir) ? 0 : -1;
}

int
setup_sim (void **state)
{
  struct env *e = calloc (1, sizeof *e);

  if (e == NULL)
    return -1;
  *state = e;
  e->sim = true;
  e->io = vr_io_sim_new (20240229);
  strcpy (e->dir, ".");
  return e->io ? 0 : -1;
}

int
teardown_env (void **state)
{
  struct env *e = *state;
  int r = 0;

  if (e->sim)
    vr_io_sim_free (e->io);
  else {
    char command[128];

    snprintf (command, sizeof command, "rm -rf '%s'", e->dir);
    r = system (command);
  }
  free (e);
  return r;
}

const char *
in_dir (const struct env *e, const char *name)
{
  static char path[4][256];
  static unsigned turn;
  char *p = path[turn++ % 4];

  snprintf (p, sizeof path[0], "%s/%s", e->dir, name);
  return p;
}

uint8_t *
read_file (struct vr_io *io, const char *path, uint64_t *ret_size)
{
  struct vr_file *f;
  uint8_t *buf;

  assert_int_equal (io->ops->open (io, path, VR_OPEN_READ_ONLY, &f), 0);
  assert_int_equal (io->ops->size (f, ret_size), 0);
  buf = malloc (*ret_size + 1);
  assert_non_null (buf);
  assert_int_equal (vr_read (f, buf, *ret_size, 0), 0);
  vr_close (f);
  return buf;
}

void
write_file (struct vr_io *io, const char *path, const void *buf,
            uint64_t size)
{
  struct vr_file *f;

  io->ops->unlink (io, path);
  assert_int_equal (io->ops->open (io, path, VR_OPEN_CREATE, &f), 0);
  assert_int_equal (vr_write (f, buf, size, 0), 0);
  assert_int_equal (vr_sync (f), 0);
  vr_close (f);
}

/* ---- Logs --------------------------------------------------------------- */

struct vr_log_config
small_config (uint64_t disk_size, uint64_t segment_size,
              uint64_t segment_count)
{
  struct vr_log_config c = {
    .vm = "vm", .disk = "d", .vm_id = { 1, 2, 3 }, .disk_size = disk_size,
    .segment_size = segment_size, .segment_count = segment_count,
    .start = { segment_size, 0 }, .generation = 1, .epoch_limit = 2,
  };

  return c;
}

struct vr_log *
open_log (struct vr_io *io, const char *path, unsigned cache)
{
  const struct vr_log_open_options options
      = { .cache_segments = cache, .direct = true };
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  struct vr_log *log = NULL;
  int err = vr_log_open (io, path, &options, &log, &problem, &owner);

  if (err < 0)
    fail_msg ("%s: %s: at %llu: %s", path, strerror (-err),
              (unsigned long long) problem.file_offset, problem.text);
  return log;
}

int
open_log_error (struct vr_io *io, const char *path,
                struct vr_log_problem *problem)
{
  const struct vr_log_open_options options = { .cache_segments = 2 };
  struct vr_lock_owner owner;
  struct vr_log *log = NULL;
  int err = vr_log_open (io, path, &options, &log, problem, &owner);

  if (err == 0)
    vr_log_close (log);
  if (err == -EUCLEAN || err == -EBADMSG || err == -EPROTO)
    assert_true (problem->text[0] != 0);
  return err;
}
