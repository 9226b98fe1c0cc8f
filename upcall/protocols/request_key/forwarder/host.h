/* What the forwarder wants of the machine it runs on: the key system calls, whom it trusts, where the log is.
 *
 * The calls return what keyctl(2) returns; -1 leaves the reason in errno. Tests link another host.
 */
#ifndef UPCALL_HOST_H
#define UPCALL_HOST_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

long assume_authority(int32_t key);
long describe(int32_t key, char *text, size_t size);   /* its whole length with the NUL, even if it did not fit */
long authorisation(void);                              /* the serial of the authorisation key */
long read_callout(uint8_t *callout, size_t size);      /* its whole length, even if it did not fit */
long set_timeout(int32_t key, uint32_t seconds);
long instantiate(int32_t key, const uint8_t *payload, size_t size);
long reject(int32_t key, uint32_t seconds, int code);  /* called by signal handlers, too */

/* How many ns of the second have gone in the clock by which keys expire. Called by signal handlers, too. */
long gone_of_second(void);

uid_t broker_uid(void);
const char *log_path(void);

#endif
