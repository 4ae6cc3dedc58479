/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep inspect: say what a file is, and for a journal or an epoch file all
 * that is in it.  Reads only. */
#include "inspect.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "format.h"
#include "io.h"
#include "output.h"
#include "vmrep.h"

enum file_type { FILE_JOURNAL, FILE_EPOCH, FILE_OTHER };

/* By magic: a file with one valid or invalid superblock, or with an epoch
   page's magic. */
static int
recognise (const char *path, enum file_type *ret, uint64_t *ret_size)
{
  struct vr_io *io = vr_io_real ();
  static const uint64_t at[3] = { VR_SUPER_A, VR_SUPER_B, 0 };
  static const char *const magic[3]
      = { VR_SUPER_MAGIC, VR_SUPER_MAGIC, VR_EPOCH_MAGIC };
  struct vr_file *f;
  int err = io->ops->open (io, path, VR_OPEN_READ_ONLY, &f);

  if (err < 0)
    return err;
  *ret = FILE_OTHER;
  err = io->ops->size (f, ret_size);
  for (size_t i = 0; i < 3 && err == 0 && *ret == FILE_OTHER; i++) {
    char found[8];

    err = vr_read (f, found, sizeof found, at[i]);
    if (err == 0 && memcmp (found, magic[i], sizeof found) == 0)
      *ret = i < 2 ? FILE_JOURNAL : FILE_EPOCH;
    if (err == -ENODATA)
      err = 0;
  }
  vr_close (f);
  return err;
}

/* ---- Epoch files -------------------------------------------------------- */

static json_t *
describe_member (const struct vr_member *m)
{
  json_t *o = must (json_object ());

  set_text (o, "disk", m->name);
  set_text (o, "kind",
            atomic_load (&m->kind) == VR_MEMBER_MEMORY ? "memory" : "disk");
  set_count (o, "pid", atomic_load (&m->pid));
  set_count (o, "sealed_epoch", atomic_load (&m->sealed_epoch));
  set_count (o, "committed_epoch", atomic_load (&m->committed_epoch));
  return o;
}

static void
describe_page (json_t *o, const struct vr_epoch_page *page)
{
  json_t *members = must (json_array ());

  set_text (o, "vm", page->vm);
  set_hex (o, "vm_id", page->vm_id, sizeof page->vm_id);
  set_text (o, "kind", page->checksum ? "backup" : "shared");
  set_count (o, "version", page->version);
  set_count (o, "generation", atomic_load (&page->generation));
  set_count (o, "open_epoch", atomic_load (&page->open_epoch));
  set_count (o, "committed_epoch", atomic_load (&page->committed_epoch));
  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++)
    if (atomic_load (&page->member[i].kind) != VR_MEMBER_FREE)
      append_json (members, describe_member (&page->member[i]));
  set_json (o, "members", members);
}

/* What is wrong with it, or NULL. */
static const char *
page_problem (const struct vr_epoch_page *page, uint64_t size)
{
  int err = vr_epoch_page_check (page);

  if (err == -EPROTO)
    return "of a newer format";
  if (size != VR_EPOCH_FILE_SIZE)
    return "its size is not that of an epoch file";
  if (err < 0)
    return "a field holds what it cannot";
  if (page->checksum && page->checksum != vr_epoch_page_checksum (page))
    return "its checksum does not match";
  return NULL;
}

static void
print_epoch (const json_t *o)
{
  const json_t *members = json_object_get (o, "members");
  bool shared = strcmp (get_text (o, "kind"), "shared") == 0;
  struct table t = { .columns = 4 };
  json_t *m;
  size_t i;

  printf ("%s: epoch file\n", get_text (o, "file"));
  if (has_value (o, "problem")) {
    printf ("  DAMAGED: %s\n", get_text (o, "problem"));
    return;
  }
  printf ("  of VM %s (%s), %s\n", get_text (o, "vm"), get_text (o, "vm_id"),
          shared ? "shared by the processes of a primary, no checksum"
                 : "a backup's list of disks, checksum right");
  if (shared)
    printf ("  epoch %llu open, %llu committed\n", LLU (o, "open_epoch"),
            LLU (o, "committed_epoch"));
  else
    printf ("  generation %llu, promoted epoch %llu\n",
            LLU (o, "generation"), LLU (o, "committed_epoch"));
  table_cell (&t, "MEMBER");
  table_cell (&t, "KIND");
  table_cell (&t, "SEALED");
  table_cell (&t, "COMMITTED");
  json_array_foreach ((json_t *) members, i, m) {
    table_cell (&t, "%s", get_text (m, "disk"));
    table_cell (&t, "%s", get_text (m, "kind"));
    table_cell (&t, "%llu", LLU (m, "sealed_epoch"));
    table_cell (&t, "%llu", LLU (m, "committed_epoch"));
  }
  table_print (&t, 2);
}

static int
inspect_epoch (const struct cli_args *args, const char *path, uint64_t size)
{
  struct vr_epoch_page *page = must (calloc (1, sizeof *page));
  struct vr_io *io = vr_io_real ();
  json_t *o = must (json_object ());
  const char *problem;
  struct vr_file *f;
  uint64_t n = size < sizeof *page ? size : sizeof *page;
  int err = io->ops->open (io, path, VR_OPEN_READ_ONLY, &f);

  if (err == 0) {
    err = vr_read (f, page, n, 0);
    vr_close (f);
  }
  set_text (o, "file", path);
  set_text (o, "type", "epoch");
  problem = err < 0 ? strerror (-err) : page_problem (page, size);
  if (problem)
    set_text (o, "problem", problem);
  else
    describe_page (o, page);
  if (args->json)
    print_json (o, false);
  else
    print_epoch (o);
  json_decref (o);
  free (page);
  return problem ? VMREP_FOUND : VMREP_OK;
}

/* ---- The verb ----------------------------------------------------------- */

static int
refuse (const struct cli_args *args, const char *path, const char *what)
{
  if (args->json) {
    json_t *o = must (json_object ());

    set_text (o, "file", path);
    set_json (o, "type", json_null ());
    set_text (o, "error", what);
    print_json (o, false);
    json_decref (o);
  }
  complain ("%s: %s", path, what);
  return VMREP_FAILED;
}

int
run_inspect (const struct cli_args *args)
{
  const char *path = args->operand[0];
  enum file_type type;
  uint64_t size = 0;
  int err = recognise (path, &type, &size);

  if (err == -EISDIR)
    return refuse (args, path, "is a directory; 'vmrep status' explains a "
                               "backup's folder");
  if (err < 0)
    return refuse (args, path,
                   err == -EINVAL ? "is neither a file nor a block device"
                                  : strerror (-err));
  if (type == FILE_EPOCH)
    return inspect_epoch (args, path, size);
  if (type == FILE_JOURNAL)
    return inspect_journal (args, path);
  return refuse (args, path,
                 size == 0 ? "is empty"
                           : "is neither a journal (no superblock at byte 0 "
                             "or 65536) nor an epoch file");
}
