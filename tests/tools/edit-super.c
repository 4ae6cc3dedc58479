/* SPDX-License-Identifier: BSD-3-Clause */
/* Changes a field of a journal's superblocks, both of them, and makes their
 * checksums right again: what another program could have written.
 *
 *   edit-super JOURNAL version|incompat|flags|generation|disk-size N
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "format.h"

static int
set_field (struct vr_super *s, const char *field, uint64_t n)
{
  if (strcmp (field, "version") == 0)
    s->version = (uint32_t) n;
  else if (strcmp (field, "incompat") == 0)
    s->incompat = (uint32_t) n;
  else if (strcmp (field, "flags") == 0)
    s->flags = (uint32_t) n;
  else if (strcmp (field, "generation") == 0)
    s->generation = n;
  else if (strcmp (field, "disk-size") == 0)
    s->disk_size = n;
  else
    return -1;
  return 0;
}

int
main (int argc, char *argv[])
{
  static const off_t places[] = { VR_SUPER_A, VR_SUPER_B };
  int fd;

  if (argc != 4) {
    fprintf (stderr, "usage: edit-super JOURNAL FIELD N\n");
    return 2;
  }
  fd = open (argv[1], O_RDWR | O_CLOEXEC);
  if (fd < 0) {
    perror (argv[1]);
    return 1;
  }
  for (size_t i = 0; i < 2; i++) {
    struct vr_super s;

    if (pread (fd, &s, sizeof s, places[i]) != (ssize_t) sizeof s)
      return 1;
    if (memcmp (s.magic, VR_SUPER_MAGIC, 8) != 0)
      continue; /* the second one is written with the first sync */
    if (set_field (&s, argv[2], strtoull (argv[3], NULL, 10)) < 0)
      return 2;
    vr_block_seal (&s);
    if (pwrite (fd, &s, sizeof s, places[i]) != (ssize_t) sizeof s)
      return 1;
  }
  return close (fd) < 0;
}
