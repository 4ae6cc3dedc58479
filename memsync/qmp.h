/* SPDX-License-Identifier: BSD-3-Clause */
/* A client of QEMU's monitor protocol (QMP) over a unix socket.
 *
 * Commands are synchronous, one at a time, each with a deadline.  Events that
 * come in between are queued and wait for vr_qmp_next_event.
 *
 * QEMU is not trusted: what it sends is bounded (VR_QMP_MESSAGE_MAX a message,
 * VR_QMP_EVENTS_MAX queued events) and checked.  After an error that leaves
 * the stream without sense (-EPROTO, -EMSGSIZE, or the peer is gone) every
 * call returns the same error at once.  After -ETIMEDOUT the connection is
 * still good: an answer that comes late is recognised by its id and dropped.
 *
 * One thread at a time may use a connection.
 */
#ifndef VR_QMP_H
#define VR_QMP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#define VR_QMP_MESSAGE_MAX (8U << 20)
#define VR_QMP_EVENTS_MAX 1024

/* What went wrong, for people; filled in whenever a call fails that takes one.
   May be NULL where a call takes it. */
struct vr_qmp_error {
  char class[64]; /* QEMU's, as "GenericError"; empty if it is not QEMU that
                     said no */
  char text[512];
};

struct vr_qmp_version {
  unsigned major, minor, micro;
};

struct vr_qmp;

/* Connect, read the greeting and negotiate (no capabilities).  QEMU serves one
   client of a monitor at a time: if there is another, no greeting comes, and
   this returns -ETIMEDOUT.

   Errors: those of connect; -ENAMETOOLONG; -ENOMEM; -ETIMEDOUT; -EPROTO: not a
   QMP server; as below. */
int vr_qmp_connect (const char *path, unsigned timeout_ms, struct vr_qmp **ret,
                    struct vr_qmp_error *error);
void vr_qmp_close (struct vr_qmp *q);

/* For poll: readable when there may be events.  What has been read already
   does not make it so: ask vr_qmp_has_event before. */
int vr_qmp_fd (const struct vr_qmp *q);

struct vr_qmp_version vr_qmp_version (const struct vr_qmp *q);

/* Run a command.  arguments may be NULL; a reference to it is consumed in any
   case.  *ret (if ret is not NULL) becomes QEMU's "return" value, for the
   caller to json_decref.

   -EREMOTEIO: QEMU refused, *error says why; -ETIMEDOUT: no answer in time,
   the command may still be carried out; -ECONNRESET: QEMU is gone; -EMSGSIZE,
   -EPROTO: it sent too much, or nonsense; -ENOMEM. */
int vr_qmp_command (struct vr_qmp *q, const char *name, json_t *arguments,
                    unsigned timeout_ms, json_t **ret,
                    struct vr_qmp_error *error);

/* Run a line of the human monitor.  *ret is its output, to be freed.  That
   monitor reports most of its errors as output. */
int vr_qmp_human (struct vr_qmp *q, const char *line, unsigned timeout_ms,
                  char **ret, struct vr_qmp_error *error);

/* Hand QEMU a duplicate of fd.  QEMU keeps it in set *ret_set, where
   "/dev/fdset/N" names it, under number *ret_fd of its own descriptors.  It
   drops the set when it is told to, or when this connection ends and nothing
   has the set open; both only while the guest runs (seen on 7.2). */
int vr_qmp_add_fd (struct vr_qmp *q, int fd, unsigned timeout_ms,
                   int64_t *ret_set, int *ret_fd, struct vr_qmp_error *error);
int vr_qmp_remove_fd (struct vr_qmp *q, int64_t set, unsigned timeout_ms,
                      struct vr_qmp_error *error);

/* The oldest event not yet taken, waiting for one if there is none; the whole
   message, for the caller to json_decref.  With timeout_ms 0 it only looks.

   -ETIMEDOUT: none came; -EOVERFLOW, once: the queue was full and events were
   lost before the one that comes next, so ask QEMU for the state; errors of
   the connection as above. */
int vr_qmp_next_event (struct vr_qmp *q, unsigned timeout_ms, json_t **ret);
bool vr_qmp_has_event (const struct vr_qmp *q);

/* The name of an event; never NULL. */
const char *vr_qmp_event_name (const json_t *event);

#endif /* VR_QMP_H */
