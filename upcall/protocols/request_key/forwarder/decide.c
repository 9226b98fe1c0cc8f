/* Checks the broker's answer and decides how to answer the key. standin.py does the same in Python. */

#define _GNU_SOURCE
#include "decide.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

/* upcall/wire/envelope.py: nlmsghdr, struct ecryptfs_message, and the head of a response's data. */
enum { RESPONSE = 103, BEFORE_DATA = 24, VERSION = 1, ANSWERED = 0, MAX_REASON = 64 };

static uint16_t native16(const uint8_t *at)
{
	uint16_t value;
	memcpy(&value, at, sizeof value);
	return value;
}

static uint32_t native32(const uint8_t *at)
{
	uint32_t value;
	memcpy(&value, at, sizeof value);
	return value;
}

static uint32_t little32(const uint8_t *at)
{
	return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* --- cifs.spnego: struct cifs_spnego_msg of fs/smb/client/cifs_spnego.h ---------------------------------------- */

/* The kernel does not check the lengths: an empty key makes it dereference NULL, a blob that is too long makes it send
 * heap memory to the server. */
static bool is_spnego(const uint8_t *data, size_t size)
{
	enum { HEAD = 16, MIN_KEY = 16, MAX_KEY = 64, MIN_BLOB = 16 };
	if (size < HEAD || little32(data) != 2 || little32(data + 4) != 0)
		return false;
	size_t key = little32(data + 8), blob = little32(data + 12);
	if (key < MIN_KEY || key > MAX_KEY || blob < MIN_BLOB)
		return false;
	return size - HEAD >= key && size - HEAD - key == blob;
}

/* --- all types -------------------------------------------------------------------------------------------------- */

/* Rejects payloads that would corrupt or disclose kernel memory, in case the broker is compromised. All other checks of
 * payloads are the broker's, by type. Types that are not named here need no check here. tests/test_forwarder_decide.py
 * compares this with the broker's rule. */
static bool is_harmless(const char *described, size_t described_size, const uint8_t *payload, size_t size)
{
	static const char SPNEGO[] = "cifs.spnego;";
	enum { NAME_SIZE = sizeof SPNEGO - 1 };
	if (described_size >= NAME_SIZE && memcmp(described, SPNEGO, NAME_SIZE) == 0)
		return is_spnego(payload, size);
	return true;
}

/* --- the message ------------------------------------------------------------------------------------------------ */

int rejectable(int code)
{
	enum { MAX_ERRNO = 4095, RESTARTS = 512, LAST_RESTART = 516 }; /* ERESTARTSYS and similar codes */
	if (code < 1 || code >= MAX_ERRNO || (code >= RESTARTS && code <= LAST_RESTART))
		return EIO;
	return code;
}

uint32_t as_counted(uint32_t seconds, long gone)
{
	static const long HALF = 500000000;
	return gone < HALF || seconds == UINT32_MAX ? seconds : seconds + 1;
}

/* nlmsghdr {len u32, type u16, flags u16, seq u32, pid u32}, {index u32, data_len u32}, {version u8, status u8,
 * errno u16}, body. */
static bool is_response(const uint8_t *message, size_t size, uint32_t seq)
{
	return size >= RESPONSE_HEAD && size <= MAX_RESPONSE && native32(message) == size &&
	       native16(message + 4) == RESPONSE && native32(message + 8) == seq && native32(message + 16) == 0 &&
	       native32(message + 20) == size - BEFORE_DATA && message[24] == VERSION;
}

static bool is_graphic(uint8_t c)
{
	return c > ' ' && c < 0x7f;
}

static int refusal(const uint8_t *message, size_t size)
{
	if (size - RESPONSE_HEAD > MAX_REASON)
		return EPROTO;
	for (size_t at = RESPONSE_HEAD; at < size; at++)
		if (!is_graphic(message[at]) && message[at] != ' ')
			return EPROTO;
	return rejectable(native16(message + 26));
}

struct decision decide(const char *described, size_t described_size, uint32_t seq, const uint8_t *message, size_t size)
{
	struct decision made = {.refusal = EPROTO};
	if (!is_response(message, size, seq))
		return made;
	if (message[25] != ANSWERED) {
		made.refusal = refusal(message, size);
		return made;
	}
	if (size <= RESPONSE_HEAD + INSTANCE_HEAD)
		return made;
	made.expiry = native32(message + RESPONSE_HEAD);
	made.payload = message + RESPONSE_HEAD + INSTANCE_HEAD;
	made.size = size - RESPONSE_HEAD - INSTANCE_HEAD;
	made.refusal = is_harmless(described, described_size, made.payload, made.size) ? 0 : EPROTO;
	return made;
}
