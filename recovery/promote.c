/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep promote: make the images of a backup the disks at its last committed
 * epoch.  What that takes, and in which order, is vr_vm_promote's. */
#include "vmrep.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "output.h"
#include "vm.h"

/* What a person can do about a refusal. */
static const char *
way_out (enum vr_refusal code)
{
  switch (code) {
  case VR_REFUSED_DAMAGE:
    return "'vmrep inspect' tells more of a file; if the primary still "
           "lives, move this folder away and let it copy again";
  case VR_REFUSED_HISTORY:
    return "start the primary and let it finish its first copy; 'vmrep "
           "status' shows how far it is";
  case VR_REFUSED_IO:
    return "mend that, then promote again: it goes on where it stopped";
  default:
    return "";
  }
}

static int
refuse (const struct cli_args *args, const char *text, const char *hint)
{
  if (args->json) {
    json_t *o = must (json_object ());

    set_bool (o, "promoted", false);
    set_text (o, "error", text);
    set_text (o, "hint", hint);
    print_json (o, false);
    json_decref (o);
  }
  complain ("%s", text);
  if (hint[0])
    complain ("%s", hint);
  return VMREP_FAILED;
}

/* Before promotion: what of each log will not count. */
static json_t *
describe_disks (const struct vr_vm *vm)
{
  json_t *disks = must (json_array ());

  for (size_t i = 0; i < vm->member_count; i++) {
    const struct vr_vm_member *m = vm->members[i];
    json_t *o = must (json_object ());
    char *path = text_of ("%s/%s.img", vm->dir, m->name);
    struct vr_log_info info;

    vr_log_info (m->log, &info);
    set_text (o, "disk", m->name);
    set_text (o, "image", path);
    set_count (o, "size", info.super.disk_size);
    set_count (o, "discarded_bytes", info.head - info.committed);
    set_bool (o, "was_promoted", info.super.flags & VR_LOG_PROMOTED);
    append_json (disks, o);
    free (path);
  }
  return disks;
}

/* The command that serves each disk from here.  Several disks share an epoch
   file; DIR/VM/epoch itself stays the backup's. */
static void
add_commands (json_t *disks, const struct vr_vm *vm)
{
  bool several = json_array_size (disks) > 1;
  json_t *o;
  size_t i;

  json_array_foreach (disks, i, o) {
    const char *disk = get_text (o, "disk");
    char *image = shell_word (get_text (o, "image"));
    char *shared = text_of ("%s/primary.epoch", vm->dir);
    char *epoch = shell_word (shared);
    char *command = text_of (
        "nbdkit vmrep primary=%s backup=none vm=%s%s%s%s%s -U %s-%s.sock",
        image, vm->name, strcmp (disk, "disk0") ? " disk=" : "",
        strcmp (disk, "disk0") ? disk : "", several ? " epoch=" : "",
        several ? epoch : "", vm->name, disk);

    set_text (o, "next", command);
    free (command);
    free (epoch);
    free (shared);
    free (image);
  }
}

static void
print_result (const json_t *result)
{
  const json_t *disks = json_object_get (result, "disks");
  json_t *o;
  size_t i;

  printf ("%s: %s at epoch %llu, generation %llu\n",
          get_text (result, "vm"),
          get_bool (result, "again") ? "was promoted before," : "promoted",
          LLU (result, "epoch"),
          LLU (result, "generation"));
  json_array_foreach ((json_t *) disks, i, o) {
    printf ("  %s: %s\n", get_text (o, "disk"), get_text (o, "image"));
    if (get_count (o, "discarded_bytes"))
      printf ("    %s of log behind that epoch do not count: never "
              "committed\n",
              bytes_text (get_count (o, "discarded_bytes")));
  }
  printf ("\nTo go on from here:\n");
  json_array_foreach ((json_t *) disks, i, o)
    printf ("  %s\n", get_text (o, "next"));
}

static int
promote (const struct cli_args *args, struct vr_vm *vm)
{
  struct vr_refused refused;
  json_t *result = must (json_object ());
  json_t *disks, *o;
  bool again = true;
  size_t i;

  /* A damaged VM's members need not be whole. */
  disks = vm->damaged.code ? must (json_array ()) : describe_disks (vm);
  if (vr_vm_promote (vm, &refused) < 0) {
    json_decref (disks);
    json_decref (result);
    return refuse (args, refused.text, way_out (refused.code));
  }
  json_array_foreach (disks, i, o)
    again = again && get_bool (o, "was_promoted");
  add_commands (disks, vm);
  set_bool (result, "promoted", true);
  set_bool (result, "again", again);
  set_text (result, "vm", vm->name);
  set_count (result, "epoch",
             atomic_load (&vm->page.committed_epoch));
  set_count (result, "generation", atomic_load (&vm->page.generation));
  set_json (result, "disks", disks);
  if (args->json)
    print_json (result, false);
  else
    print_result (result);
  json_decref (result);
  return VMREP_OK;
}

int
run_promote (const struct cli_args *args)
{
  struct vr_vm_config c = { .dir = args->operand[0],
                            .name = args->operand[1] };
  struct vr_vm *vm;
  char message[512], *text;
  const char *hint = "";
  int err, r;

  if (!vr_name_ok (c.name)) {
    complain ("promote: '%s' is no VM's name", c.name);
    return VMREP_USAGE;
  }
  err = vr_vm_open (vr_io_real (), &c, &vm, message, sizeof message);
  if (err == 0) {
    r = promote (args, vm);
    vr_vm_close (vm);
    return r;
  }
  if (err == -EAGAIN)
    hint = "stop that nbdkit vmrep-backup first; then nothing more can "
           "arrive";
  text = err == -ENOENT
             ? text_of ("%s: no VM %s is backed up here", c.dir, c.name)
             : text_of ("%s", message[0] ? message : strerror (-err));
  r = refuse (args, text, hint);
  free (text);
  return r;
}
