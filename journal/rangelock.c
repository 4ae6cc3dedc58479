/* SPDX-License-Identifier: BSD-3-Clause */
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>

#include "journal/rangelock.h"

/* Without sums, which could overflow. */
static bool
overlap (const struct vr_range *a, const struct vr_range *b)
{
  if (a->offset >= b->offset)
    return a->offset - b->offset < b->length;
  return b->offset - a->offset < a->length;
}

/* Is an older range, held or waiting, in the way?  To wait for those that
   still wait is what keeps the order. */
static bool
must_wait (const struct vr_range *r)
{
  for (const struct vr_range *o = r->prev; o; o = o->prev)
    if (overlap (o, r))
      return true;
  return false;
}

static void
append (struct vr_rangelock *l, struct vr_range *r)
{
  r->next = NULL;
  r->prev = l->last;
  if (l->last)
    l->last->next = r;
  else
    l->first = r;
  l->last = r;
}

static void
take_out (struct vr_rangelock *l, struct vr_range *r)
{
  if (r->prev)
    r->prev->next = r->next;
  else
    l->first = r->next;
  if (r->next)
    r->next->prev = r->prev;
  else
    l->last = r->prev;
}

int
vr_rangelock_init (struct vr_rangelock *l)
{
  int r;

  l->first = l->last = NULL;
  l->waiters = 0;
  r = pthread_mutex_init (&l->mutex, NULL);
  if (r != 0)
    return -r;
  r = pthread_cond_init (&l->released, NULL);
  if (r != 0)
    pthread_mutex_destroy (&l->mutex);
  return -r;
}

void
vr_rangelock_destroy (struct vr_rangelock *l)
{
  assert (!l->first);
  pthread_cond_destroy (&l->released);
  pthread_mutex_destroy (&l->mutex);
}

void
vr_rangelock_lock (struct vr_rangelock *l, struct vr_range *r, uint64_t offset,
                   uint64_t length)
{
  r->offset = offset;
  r->length = length;
  r->next = r->prev = NULL;
  if (length == 0)
    return;

  pthread_mutex_lock (&l->mutex);
  append (l, r);
  if (must_wait (r)) {
    l->waiters++;
    do
      pthread_cond_wait (&l->released, &l->mutex);
    while (must_wait (r));
    l->waiters--;
  }
  pthread_mutex_unlock (&l->mutex);
}

void
vr_rangelock_unlock (struct vr_rangelock *l, struct vr_range *r)
{
  if (r->length == 0)
    return;
  pthread_mutex_lock (&l->mutex);
  take_out (l, r);
  if (l->waiters > 0)
    pthread_cond_broadcast (&l->released);
  pthread_mutex_unlock (&l->mutex);
}
