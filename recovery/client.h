/* SPDX-License-Identifier: BSD-3-Clause */
/* NBD connections with deadlines, several of them worked at once.
 *
 *   connect ─▶ negotiating ─ go ─▶ open ─ reads …
 *                  │    ▲ refused
 *                  └────┘
 *
 * Functions return 0 or a negative errno, with client->error for the user.
 */
#ifndef VMREP_CLIENT_H
#define VMREP_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "format.h"

/* How long a server may take to answer. */
#define CLIENT_ANSWER_MS 5000

struct client {
  struct nbd_handle *nbd;
  char error[512];
  unsigned pending; /* answers that have not come */
  int failed;       /* errno of one that was an error, since last cleared */
};

/* Connect and stop before an export is chosen.  Whatever the result,
   client_close must follow. */
int client_connect (struct client *c, const char *uri);
void client_close (struct client *c);

/* The export the URI named; to be freed.  NULL when out of memory. */
char *client_export (struct client *c);

/* Names of all exports, in one call of fn each. */
int client_list (struct client *c, void (*fn) (void *opaque, const char *name),
                 void *opaque);

/* Choose an export.  begin_go only starts it: wait for client_settled, then
   ask client_is_open.  A refusal leaves the connection as before. */
int client_begin_go (struct client *c, const char *export);
int client_go (struct client *c, const char *export);
bool client_is_open (struct client *c);
int64_t client_size (struct client *c);

/* Start a read; *c->pending goes down when it has ended. */
int client_begin_read (struct client *c, void *buf, size_t n,
                       uint64_t offset);
int client_read (struct client *c, void *buf, size_t n, uint64_t offset);

/* Nothing is owed by the server. */
bool client_settled (const struct client *c);

/* Let all n work until each is settled.  -ETIMEDOUT after timeout_ms without
   that; the client that is to blame has an error text. */
int client_wait (struct client *const *c, size_t n, int timeout_ms);

/* Read the status block of the log export this client opened.  -EPROTO: the
   server has none. */
int client_read_status (struct client *c, struct vr_status *ret);

#endif /* VMREP_CLIENT_H */
