/* SPDX-License-Identifier: BSD-3-Clause */
/* vr_ram_check of ram.h: what rules out protection. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "memsync/ram.h"

#define QMP_TIMEOUT_MS 2000

/* ---- Migration ---------------------------------------------------------- */

/* What query-migrate may say when nothing is under way. */
static bool
is_idle (const char *status)
{
  static const char *const idle[]
    = { "none", "completed", "failed", "cancelled" };

  for (size_t i = 0; i < sizeof idle / sizeof idle[0]; i++)
    if (strcmp (status, idle[i]) == 0)
      return true;
  return false;
}

/* Field `name` of a command's answer; *ret (to be freed) is "" when there is
   none. */
static int
ask (struct vr_qmp *q, const char *command, const char *name, char **ret,
     struct vr_problem *problem)
{
  struct vr_qmp_error error;
  const char *text;
  json_t *value;
  int err = vr_qmp_command (q, command, NULL, QMP_TIMEOUT_MS, &value, &error);

  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  text = json_string_value (json_object_get (value, name));
  *ret = strdup (text ? text : "");
  json_decref (value);
  return *ret ? 0 : vr_problem (problem, -ENOMEM, "out of memory");
}

static int
check_migration (struct vr_qmp *q, struct vr_problem *problem)
{
  char *status;
  int err = ask (q, "query-migrate", "status", &status, problem);

  if (err < 0)
    return err;
  if (status[0] && !is_idle (status))
    err = vr_problem (problem, -EBUSY,
                      "a migration is under way (%s): wait for its end, or "
                      "cancel it", status);
  free (status);
  if (err < 0)
    return err;

  err = ask (q, "query-status", "status", &status, problem);
  if (err < 0)
    return err;
  if (strcmp (status, "inmigrate") == 0)
    err = vr_problem (problem, -EBUSY,
                      "the guest waits for an incoming migration");
  free (status);
  return err;
}

/* ---- Devices ------------------------------------------------------------ */

struct kind {
  const char *prefix;
  const char *why;
};

static const struct kind kinds[] = {
  { "vhost-user-", "another process writes the guest's memory; use the virtio "
                   "device of QEMU itself" },
  { "vhost-vdpa", "hardware writes the guest's memory; use the virtio device "
                  "of QEMU itself" },
  { "vfio-", "hardware writes the guest's memory; use an emulated device" },
  { "ivshmem", "other guests write its memory; remove it" },
};

/* type is followed by the '>' of "child<TYPE>". */
static int
check_device (const char *type, const char *name, struct vr_problem *problem)
{
  const int n = (int) strcspn (type, ">");

  for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
    if (strncmp (type, kinds[i].prefix, strlen (kinds[i].prefix)) == 0)
      return vr_problem (problem, -EOPNOTSUPP, "device %s (%.*s): %s", name, n,
                         type, kinds[i].why);
  return 0;
}

/* The devices of one folder of QEMU's object tree. */
static int
check_folder (struct vr_qmp *q, const char *path, struct vr_problem *problem)
{
  static const char child[] = "child<";
  struct vr_qmp_error error;
  json_t *list, *entry;
  size_t i;
  int err = vr_qmp_command (q, "qom-list", json_pack ("{s:s}", "path", path),
                            QMP_TIMEOUT_MS, &list, &error);

  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  json_array_foreach (list, i, entry) {
    const char *name = json_string_value (json_object_get (entry, "name"));
    const char *type = json_string_value (json_object_get (entry, "type"));

    if (err == 0 && name && type
        && strncmp (type, child, sizeof child - 1) == 0)
      err = check_device (type + sizeof child - 1, name, problem);
  }
  json_decref (list);
  return err;
}

/* A virtio-net device of QEMU may have a back end that is not.  Lines are
   "NAME: index=0,type=TYPE,…", possibly indented. */
static int
check_network (struct vr_qmp *q, struct vr_problem *problem)
{
  static const char mark[] = "type=vhost-";
  struct vr_qmp_error error;
  const char *found, *line;
  char *text;
  int err = vr_qmp_human (q, "info network", QMP_TIMEOUT_MS, &text, &error);

  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  found = strstr (text, mark);
  if (found) {
    for (line = found; line > text && line[-1] != '\n'; line--)
      ;
    line += strspn (line, " \\");
    err = vr_problem (problem, -EOPNOTSUPP,
                      "network %.*s (%.*s): the guest's memory is written "
                      "behind QEMU's back; use -netdev stream or tap",
                      (int) strcspn (line, ":\r\n"), line,
                      (int) strcspn (found + 5, ",\r\n"), found + 5);
  }
  free (text);
  return err;
}

int
vr_ram_check (struct vr_qmp *q, struct vr_problem *problem)
{
  int err = check_migration (q, problem);

  if (err == 0)
    err = check_folder (q, "/machine/peripheral", problem);
  if (err == 0)
    err = check_folder (q, "/machine/peripheral-anon", problem);
  if (err == 0)
    err = check_network (q, problem);
  return err;
}
