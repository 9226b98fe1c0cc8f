/* The checks before the kernel sees a payload, which it then trusts. standin.py says the same in Python. */

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

static uint32_t little16(const uint8_t *at)
{
	return (uint32_t)at[0] | (uint32_t)at[1] << 8;
}

static uint32_t little32(const uint8_t *at)
{
	return little16(at) | little16(at + 2) << 16;
}

/* --- cifs.spnego: struct cifs_spnego_msg of fs/smb/client/cifs_spnego.h ---------------------------------------- */

/* The kernel checks none of the lengths: no key is a NULL dereference, a blob too long sends its heap to the server. */
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

/* --- dns_resolver: net/dns_resolver/dns_key.c, include/uapi/linux/dns_resolver.h ------------------------------- */

static bool is_graphic(uint8_t c)
{
	return c > ' ' && c < 0x7f;
}

/* "dnserror=" and 1 to 511, in decimal: what the key is to say instead of an address. */
static bool is_dns_error(const uint8_t *text, size_t size)
{
	static const char NAME[] = "dnserror=";
	enum { NAME_SIZE = sizeof NAME - 1, MAX_DIGITS = 3, MAX_ERROR = 511 };
	if (size <= NAME_SIZE || size > NAME_SIZE + MAX_DIGITS || memcmp(text, NAME, NAME_SIZE) != 0)
		return false;
	unsigned value = 0;
	for (size_t at = NAME_SIZE; at < size; at++) {
		if (text[at] < '0' || text[at] > '9' || (at == NAME_SIZE && text[at] == '0'))
			return false;
		value = value * 10 + (unsigned)(text[at] - '0');
	}
	return value <= MAX_ERROR;
}

/* "item,item", then perhaps "#dnserror=3", which may also stand alone; then the NUL that the kernel wants. */
static bool is_dns_text(const uint8_t *data, size_t size)
{
	enum { MAX_TEXT = 4095 };
	if (size < 2 || size > MAX_TEXT + 1 || data[size - 1] != 0)
		return false;
	size--;
	const uint8_t *option = memchr(data, '#', size);
	size_t items = option ? (size_t)(option - data) : size;
	if (option && !is_dns_error(option + 1, size - items - 1))
		return false;
	for (size_t at = 0; at < items; at++) {
		bool empty = data[at] == ',' && (at == 0 || at + 1 == items || data[at - 1] == ',');
		if (!is_graphic(data[at]) || empty)
			return false;
	}
	return true;
}

struct rest {
	const uint8_t *at;
	size_t size;
};

/* The next `size` bytes, or NULL if they are not there. */
static const uint8_t *take(struct rest *rest, size_t size)
{
	if (rest->size < size)
		return NULL;
	const uint8_t *taken = rest->at;
	rest->at += size;
	rest->size -= size;
	return taken;
}

enum { SOURCES = 6, STATUSES = 8, PROTOCOLS = 3, MAX_NAME = 255 };

/* name_len, priority, weight, port (u16 each), source, status, protocol, nr_addrs (u8 each); name; addresses. */
static bool take_server(struct rest *rest)
{
	const uint8_t *head = take(rest, 12);
	if (!head || head[8] >= SOURCES || head[9] >= STATUSES || head[10] >= PROTOCOLS)
		return false;
	size_t size = little16(head);
	const uint8_t *name = take(rest, size);
	if (!name || size < 1 || size > MAX_NAME)
		return false;
	for (size_t at = 0; at < size; at++)
		if (!is_graphic(name[at]))
			return false;
	for (unsigned left = head[11]; left > 0; left--) {
		const uint8_t *type = take(rest, 1);
		if (!type || *type > 1 || !take(rest, *type == 0 ? 4 : 16))
			return false;
	}
	return true;
}

/* A server list: zero, content 0, version 1, source, status, nr_servers (u8 each); servers. */
static bool is_dns_servers(const uint8_t *data, size_t size)
{
	struct rest rest = {data, size};
	const uint8_t *head = take(&rest, 6);
	if (!head || head[0] != 0 || head[1] != 0 || head[2] != 1 || head[3] >= SOURCES || head[4] >= STATUSES)
		return false;
	for (unsigned left = head[5]; left > 0; left--)
		if (!take_server(&rest))
			return false;
	return rest.size == 0;
}

static bool is_dns(const uint8_t *data, size_t size)
{
	return size > 0 && data[0] == 0 ? is_dns_servers(data, size) : is_dns_text(data, size);
}

/* --- all types -------------------------------------------------------------------------------------------------- */

static const struct {
	const char *name;
	bool (*check)(const uint8_t *data, size_t size);
} TYPES[] = {{"cifs.spnego;", is_spnego}, {"dns_resolver;", is_dns}};

/* 0, or the errno to reject the key with. */
static int check_payload(const char *described, size_t described_size, const uint8_t *payload, size_t size)
{
	for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++) {
		size_t length = strlen(TYPES[i].name);
		if (described_size >= length && memcmp(described, TYPES[i].name, length) == 0)
			return TYPES[i].check(payload, size) ? 0 : EPROTO;
	}
	return EKEYREJECTED;
}

/* --- the message ------------------------------------------------------------------------------------------------ */

int rejectable(int code)
{
	enum { MAX_ERRNO = 4095, RESTARTS = 512, LAST_RESTART = 516 }; /* ERESTARTSYS and its kin */
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
	made.refusal = check_payload(described, described_size, made.payload, made.size);
	return made;
}
