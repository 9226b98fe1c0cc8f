/* Declares the forwarder's interface to the machine: the key system calls, the broker's uid and the log's path.
 *
 * The calls return what keyctl(2) returns: -1 on failure, with errno set. Tests link another implementation.
 */
#ifndef UPCALL_HOST_H
#define UPCALL_HOST_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

long assume_authority(int32_t key);
long describe(int32_t key, char *text, size_t size);   /* returns the whole length with the NUL, even if too long */
long authorisation(void);                              /* returns the serial number of the authorisation key */
long read_callout(uint8_t *callout, size_t size);      /* returns the whole length, even if too long */
long set_timeout(int32_t key, uint32_t seconds);
long instantiate(int32_t key, const uint8_t *payload, size_t size);
long reject(int32_t key, uint32_t seconds, int code);  /* called by signal handlers, too */

/* Returns the nanoseconds since the last full second of the clock by which keys expire. Called by signal handlers. */
long gone_of_second(void);

uid_t broker_uid(void);
const char *log_path(void);

#endif
