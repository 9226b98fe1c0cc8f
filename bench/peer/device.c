/* Frames of /dev/ecryptfs, made and checked as by fs/ecryptfs (miscdev.c and messaging.c of Linux 6.1):
 *
 *   type u8, seq u32 big-endian, length (1 or 2 bytes), index u32, data_len u32, the packet
 */
#include "wire.h"

#include <arpa/inet.h>

enum { HEAD = 5, MESSAGE = 8 };

static size_t put_length(uint8_t *at, size_t size)
{
	if (size < 192) {
		at[0] = (uint8_t)size;
		return 1;
	}
	at[0] = (uint8_t)(((size - 192) >> 8) + 192);
	at[1] = (uint8_t)(size - 192);
	return 2;
}

/* Makes a REQUEST. `uid`: unused, because the kernel chooses the daemon by the open device. */
size_t pack_frame(uint8_t *out, uint32_t seq, uint32_t index, uint32_t uid, const void *body, size_t size)
{
	uint32_t counter = htonl(seq), data_len = (uint32_t)size;
	uint8_t *at = out + HEAD;
	(void)uid;
	out[0] = REQUEST;
	memcpy(out + 1, &counter, sizeof counter);
	at += put_length(at, MESSAGE + size);
	memcpy(at, &index, sizeof index);
	memcpy(at + 4, &data_len, sizeof data_len);
	memcpy(at + MESSAGE, body, size);
	return (size_t)(at - out) + MESSAGE + size;
}

/* Returns 1 for an answer, 0 for one that the kernel would reject with EINVAL, -1 for what it ignores. */
int parse_frame(const uint8_t *data, ssize_t size, struct answer *answer)
{
	const uint8_t *at = data + HEAD, *end = data + size;
	uint32_t counter, data_len;
	if (size < HEAD)
		return 0;
	if (data[0] == HELO || data[0] == QUIT)
		return -1;
	size_t whole = data[0] == RESPONSE ? take_length(&at, end) : (size_t)-1;
	if (whole != (size_t)(end - at) || whole < MESSAGE + 2)
		return 0;
	memcpy(&counter, data + 1, sizeof counter);
	memcpy(&answer->index, at, sizeof answer->index);
	memcpy(&data_len, at + 4, sizeof data_len);
	if (data_len != whole - MESSAGE)
		return 0;
	answer->seq = ntohl(counter);
	answer->body = at + MESSAGE;
	answer->size = data_len;
	answer->refused = answer->body[1] != 0; /* the packet's status, behind its tag */
	return 1;
}
