/* SPDX-License-Identifier: BSD-3-Clause */
/* See ram.h. */
#include "memsync/ram.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "memsync/delta.h" /* VR_RAM_BLOCKS_MAX, VR_PAGE_SIZE */

#define QMP_TIMEOUT_MS 2000
#define ADDRESS_MAX (UINT64_C (1) << 62) /* so that sums do not wrap */
#define ALIGN (UINT64_C (2) << 20) /* of a block's address, QEMU's on x86 */

/* ---- info ramblock ------------------------------------------------------ */

/* Cut the last word off [line, *end); NULL if there is none. */
static const char *
last_word (const char *line, const char **end)
{
  const char *p = *end;

  while (p > line && p[-1] == ' ')
    p--;
  *end = p;
  while (p > line && p[-1] != ' ')
    p--;
  return p < *end ? p : NULL;
}

/* The last word as a number below ADDRESS_MAX. */
static bool
last_number (const char *line, const char **end, int base, uint64_t *ret)
{
  const char *word = last_word (line, end);
  char *behind;

  if (!word)
    return false;
  errno = 0;
  *ret = strtoull (word, &behind, base);
  if (errno != 0 || behind != *end || *ret > ADDRESS_MAX)
    return false;
  *end = word;
  return true;
}

/* "4 KiB" */
static bool
last_size (const char *line, const char **end, uint64_t *ret)
{
  static const char units[] = "BKMGT";
  const char *unit = last_word (line, end), *known;

  if (!unit || !(known = strchr (units, *unit)) || *known == 0)
    return false;
  *end = unit;
  if (!last_number (line, end, 10, ret) || *ret > 1024)
    return false;
  *ret <<= 10 * (known - units);
  return true;
}

/* NAME PAGE-SIZE OFFSET USED TOTAL [HVA ro|rw]; from the right, as a name may
   have spaces. */
static bool
parse_block (const char *line, const char *end, struct vr_ram_block *ret)
{
  const char *p = end, *word = last_word (line, &p);
  uint64_t offset;

  memset (ret, 0, sizeof *ret);
  if (!word)
    return false;
  if (p - word == 2 && (memcmp (word, "ro", 2) == 0
                        || memcmp (word, "rw", 2) == 0)) {
    p = word;
    if (!last_number (line, &p, 16, &ret->address))
      return false;
  }
  if (!last_number (line, &p, 16, &ret->size)
      || !last_number (line, &p, 16, &ret->used)
      || !last_number (line, &p, 16, &offset)
      || !last_size (line, &p, &ret->page_size))
    return false;
  while (p > line && p[-1] == ' ')
    p--;
  while (line < p && *line == ' ')
    line++;
  if (p - line >= VR_RAM_NAME_SIZE)
    return false;
  memcpy (ret->name, line, (size_t) (p - line));
  return true;
}

static int
check_block (const struct vr_ram_block *b, struct vr_problem *problem)
{
  if (b->name[0] == 0)
    return vr_problem (problem, -ENODEV,
                       "a RAM block of %" PRIu64 " bytes has no name: some "
                       "device of this guest cannot migrate", b->size);
  if (b->used > b->size || b->size % VR_PAGE_SIZE != 0
      || b->address % VR_PAGE_SIZE != 0
      || b->size / VR_PAGE_SIZE > VR_RAM_PAGES_MAX
      || b->page_size < VR_PAGE_SIZE)
    return vr_problem (problem, -EPROTO,
                       "RAM block %s has an impossible size or address",
                       b->name);
  return 0;
}

int
vr_ram_parse_blocks (const char *text, struct vr_ram *ret,
                     struct vr_problem *problem)
{
  const char *end = strchr (text, '\n');
  struct vr_ram_block *b;
  int err = 0;

  ret->count = 0;
  ret->blocks = calloc (VR_RAM_BLOCKS_MAX, sizeof *ret->blocks);
  if (!ret->blocks)
    return vr_problem (problem, -ENOMEM, "out of memory");
  if (!end || !strstr (text, "Block Name"))
    return vr_problem (problem, -EPROTO, "info ramblock: no table");
  while (err == 0 && *(text = end + 1) && (end = strchr (text, '\n'))) {
    if (end > text && end[-1] == '\r')
      end--;
    if (ret->count == VR_RAM_BLOCKS_MAX)
      return vr_problem (problem, -ENODEV, "more than %d RAM blocks",
                         VR_RAM_BLOCKS_MAX);
    b = &ret->blocks[ret->count++];
    if (!parse_block (text, end, b))
      return vr_problem (problem, -EPROTO, "info ramblock: line not "
                         "understood: %.*s", (int) (end - text), text);
    err = check_block (b, problem);
    end = strchr (end, '\n');
  }
  return err;
}

/* ---- info mtree -f ------------------------------------------------------ */

/* "  START-END (prio N, TYPE): NAME[ @OFFSET][ KVM]" */
static bool
parse_range (const char *line, const char *end, struct vr_ram_range *ret)
{
  char copy[512], type[16];
  const char *at;
  int n = 0;

  if ((size_t) (end - line) >= sizeof copy)
    return false;
  memcpy (copy, line, (size_t) (end - line));
  copy[end - line] = 0;
  if (sscanf (copy, " %" SCNx64 "-%*x (prio %*d, %15[^)]): %255s%n",
              &ret->guest_address, type, ret->name, &n)
        != 3
      || n == 0)
    return false;
  if (strcmp (type, "ram") != 0 && strcmp (type, "rom") != 0
      && strcmp (type, "romd") != 0 && strcmp (type, "nv-ram") != 0)
    return false;
  at = strstr (copy + n, " @");
  ret->offset = at ? strtoull (at + 2, NULL, 16) : 0;
  return true;
}

bool
vr_ram_next_range (const char **text, struct vr_ram_range *ret)
{
  const char *line, *end;

  while (**text) {
    line = *text;
    end = line + strcspn (line, "\r\n");
    *text = end + strspn (end, "\r\n");
    if (parse_range (line, end, ret))
      return true;
  }
  return false;
}

/* "Host virtual address for 0x0 (pc.ram) is 0x7f6063e00000" */
static bool
parse_host_address (const char *text, const char *name, uint64_t *ret)
{
  char found[VR_RAM_NAME_SIZE];

  return sscanf (text,
                 "Host virtual address for 0x%*x (%255[^)]) is 0x%" SCNx64,
                 found, ret)
           == 2
         && strcmp (found, name) == 0 && *ret <= ADDRESS_MAX;
}

/* A memory region's name is what is behind the last slash of the block's. */
static const char *
region_of (const struct vr_ram_block *b)
{
  const char *slash = strrchr (b->name, '/');

  return slash ? slash + 1 : b->name;
}

/* The one block of a region that has no address yet; NULL if there is none, or
   more than one. */
static struct vr_ram_block *
only_block_of (const struct vr_ram *ram, const char *region)
{
  struct vr_ram_block *found = NULL;

  for (unsigned i = 0; i < ram->count; i++) {
    struct vr_ram_block *b = &ram->blocks[i];

    if (strcmp (region_of (b), region) != 0)
      continue;
    if (found)
      return NULL;
    found = b;
  }
  return found && found->address == 0 ? found : NULL;
}

static int
ask_host_address (struct vr_qmp *q, const struct vr_ram_range *range,
                  struct vr_ram_block *b, struct vr_problem *problem)
{
  struct vr_qmp_error error;
  char line[64], *text;
  uint64_t address;
  int err;

  snprintf (line, sizeof line, "gpa2hva 0x%" PRIx64, range->guest_address);
  err = vr_qmp_human (q, line, QMP_TIMEOUT_MS, &text, &error);
  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  /* Another address space may show another region there: ask for the next. */
  if (parse_host_address (text, range->name, &address)
      && range->offset < b->size && address > range->offset)
    b->address = address - range->offset;
  free (text);
  return 0;
}

static int
find_by_guest_address (struct vr_qmp *q, const struct vr_ram *ram,
                       struct vr_problem *problem)
{
  struct vr_qmp_error error;
  struct vr_ram_range range;
  struct vr_ram_block *b;
  const char *p;
  char *text;
  int err = vr_qmp_human (q, "info mtree -f", QMP_TIMEOUT_MS, &text, &error);

  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  p = text;
  while (err == 0 && vr_ram_next_range (&p, &range)) {
    b = only_block_of (ram, range.name);
    if (b)
      err = ask_host_address (q, &range, b, problem);
  }
  free (text);
  return err;
}

/* ---- /proc/PID/maps ----------------------------------------------------- */

struct mapping {
  uint64_t start, end;
  bool accessible; /* read and write, but no code */
  bool none;       /* not accessible at all */
  bool shared;
};

struct mappings {
  size_t count, capacity;
  struct mapping *v;
};

static int
add_mapping (struct mappings *m, const char *line)
{
  struct mapping new = { 0 };
  char mode[5] = "";
  void *p;

  if (sscanf (line, "%" SCNx64 "-%" SCNx64 " %4s", &new.start, &new.end, mode)
      != 3)
    return 0;
  new.accessible = memcmp (mode, "rw-", 3) == 0;
  new.none = memcmp (mode, "---", 3) == 0;
  new.shared = mode[3] == 's';
  if (m->count == m->capacity) {
    m->capacity = m->capacity ? m->capacity * 2 : 256;
    p = realloc (m->v, m->capacity * sizeof *m->v);
    if (!p)
      return -ENOMEM;
    m->v = p;
  }
  m->v[m->count++] = new;
  return 0;
}

static int
read_mappings (pid_t pid, struct mappings *ret)
{
  char path[64], line[8192];
  FILE *f;
  int err = 0;

  memset (ret, 0, sizeof *ret);
  snprintf (path, sizeof path, "/proc/%d/maps", (int) pid);
  f = fopen (path, "re");
  if (!f)
    return -errno;
  while (err == 0 && fgets (line, sizeof line, f))
    err = add_mapping (ret, line);
  fclose (f);
  return err;
}

static bool
is_taken (const struct vr_ram *ram, uint64_t start)
{
  for (unsigned i = 0; i < ram->count; i++)
    if (start >= ram->blocks[i].address
        && start - ram->blocks[i].address < ram->blocks[i].size)
      return true;
  return false;
}

/* Could a block of this size be the end of mapping i? */
static bool
fits (const struct vr_ram *ram, const struct mappings *m, size_t i,
      uint64_t size)
{
  const struct mapping *a = &m->v[i];
  const uint64_t start = a->end - size;

  return i + 1 < m->count && a->accessible && a->end - a->start >= size
         && start % ALIGN == 0 && m->v[i + 1].none
         && m->v[i + 1].start == a->end
         && m->v[i + 1].end - m->v[i + 1].start == VR_PAGE_SIZE
         && !is_taken (ram, start);
}

/* The ROM of a PCI device, or the machine's own copy of the option ROMs: read
   from a file, and the guest cannot write it. */
static bool
is_rom (const struct vr_ram_block *b)
{
  const char *region = region_of (b);
  const size_t n = strlen (region);

  return n >= 4 && strcmp (region + n - 4, ".rom") == 0;
}

/* Does memory of the process start as the ROM of a PCI device does? */
static bool
has_rom_signature (pid_t pid, uint64_t address)
{
  uint8_t start[2];
  struct iovec here = { start, sizeof start };
  struct iovec there = { (void *) (uintptr_t) address, sizeof start };

  return process_vm_readv (pid, &here, 1, &there, 1, 0) == sizeof start
         && start[0] == 0x55 && start[1] == 0xaa;
}

/* Find a block that is no ROM by its size.  Only if there is one of each: but
   ROMs, which are known by their signature, do not count. */
static void
find_by_mapping (const struct vr_ram *ram, const struct mappings *m, pid_t pid,
                 struct vr_ram_block *b)
{
  uint64_t address = 0;
  unsigned mappings = 0, blocks = 0;

  for (unsigned i = 0; i < ram->count; i++)
    blocks += ram->blocks[i].address == 0 && ram->blocks[i].size == b->size
              && !is_rom (&ram->blocks[i]);
  for (size_t i = 0; i < m->count; i++)
    if (fits (ram, m, i, b->size)
        && !has_rom_signature (pid, m->v[i].end - b->size)) {
      mappings++;
      address = m->v[i].end - b->size;
    }
  if (blocks == 1 && mappings == 1)
    b->address = address;
}

/* A block may span several mappings, as of a file in parts, but no gap. */
static int
check_mapping (const struct mappings *m, struct vr_ram_block *b,
               struct vr_problem *problem)
{
  uint64_t at = b->address;

  for (size_t i = 0; i < m->count && at < b->address + b->size; i++)
    if (at >= m->v[i].start && at < m->v[i].end && m->v[i].accessible) {
      b->shared = m->v[i].shared;
      at = m->v[i].end;
    }
  if (at < b->address + b->size)
    return vr_problem (problem, -ENODEV,
                       "RAM block %s: its memory cannot be written to, or is "
                       "not where QEMU says", b->name);
  return 0;
}

static int
find_in_mappings (const struct vr_ram *ram, pid_t pid,
                  struct vr_problem *problem)
{
  struct mappings m;
  int err = read_mappings (pid, &m);

  if (err < 0)
    vr_problem (problem, err, "process %d: reading its mappings: %s",
                (int) pid, strerror (-err));
  for (unsigned i = 0; i < ram->count && err == 0; i++) {
    struct vr_ram_block *b = &ram->blocks[i];

    if (b->address == 0 && !is_rom (b))
      find_by_mapping (ram, &m, pid, b);
    if (b->address != 0)
      err = check_mapping (&m, b, problem);
    else if (!is_rom (b))
      err = vr_problem (problem, -ENODEV,
                        "RAM block %s cannot be found in QEMU's memory; "
                        "QEMU 8.1 and later tell where it is", b->name);
  }
  free (m.v);
  return err;
}

/* ---- All of it ---------------------------------------------------------- */

static bool
is_any_missing (const struct vr_ram *ram)
{
  for (unsigned i = 0; i < ram->count; i++)
    if (ram->blocks[i].address == 0)
      return true;
  return false;
}

int
vr_ram_find (struct vr_qmp *q, pid_t pid, struct vr_ram *ret,
             struct vr_problem *problem)
{
  struct vr_qmp_error error;
  char *text;
  int err = vr_qmp_human (q, "info ramblock", QMP_TIMEOUT_MS, &text, &error);

  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  err = vr_ram_parse_blocks (text, ret, problem);
  free (text);
  if (err == 0 && is_any_missing (ret))
    err = find_by_guest_address (q, ret, problem);
  if (err == 0)
    err = find_in_mappings (ret, pid, problem);
  if (err < 0)
    vr_ram_free (ret);
  return err;
}

void
vr_ram_free (struct vr_ram *ram)
{
  free (ram->blocks);
  ram->blocks = NULL;
  ram->count = 0;
}
