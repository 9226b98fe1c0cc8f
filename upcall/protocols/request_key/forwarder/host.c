/* Implements host.h by raw system calls: glibc has no wrappers. Source: include/uapi/linux/keyctl.h. */

#define _GNU_SOURCE
#include "host.h"

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DESCRIBE = 6, READ = 11, INSTANTIATE = 12, SET_TIMEOUT = 15, ASSUME_AUTHORITY = 16, REJECT = 19 };
enum { GET_KEYRING_ID = 0 };

static const long AUTHORISATION_KEY = -7; /* KEY_SPEC_REQKEY_AUTH_KEY */
static const long NO_KEYRING = 0;

long assume_authority(int32_t key)
{
	return syscall(SYS_keyctl, (long)ASSUME_AUTHORITY, (long)key, 0L, 0L, 0L);
}

long describe(int32_t key, char *text, size_t size)
{
	return syscall(SYS_keyctl, (long)DESCRIBE, (long)key, text, size, 0L);
}

long authorisation(void)
{
	return syscall(SYS_keyctl, (long)GET_KEYRING_ID, AUTHORISATION_KEY, 0L, 0L, 0L);
}

long read_callout(uint8_t *callout, size_t size)
{
	return syscall(SYS_keyctl, (long)READ, AUTHORISATION_KEY, callout, size, 0L);
}

long set_timeout(int32_t key, uint32_t seconds)
{
	return syscall(SYS_keyctl, (long)SET_TIMEOUT, (long)key, (unsigned long)seconds, 0L, 0L);
}

long instantiate(int32_t key, const uint8_t *payload, size_t size)
{
	return syscall(SYS_keyctl, (long)INSTANTIATE, (long)key, payload, size, NO_KEYRING);
}

long reject(int32_t key, uint32_t seconds, int code)
{
	return syscall(SYS_keyctl, (long)REJECT, (long)key, (unsigned long)seconds, (long)code, NO_KEYRING);
}

long gone_of_second(void)
{
	struct timespec time = {0};
	clock_gettime(CLOCK_REALTIME_COARSE, &time); /* the clock of ktime_get_real_seconds() */
	return time.tv_nsec;
}

uid_t broker_uid(void)
{
	return 0;
}

const char *log_path(void)
{
	return "/dev/log";
}
