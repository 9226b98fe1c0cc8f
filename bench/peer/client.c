/* Measuring clients. They execute commands from stdin and answer each with a line on stdout:
 *
 *   body HEX EXPECTED SIZE    sets the request's body, and how the answer's begins and how long it is     ready
 *   run COUNT INFLIGHT MS     makes COUNT requests, for at most MS     answered refused wrong p50 p99 p99.9 wall  (ns)
 *   answers                   the bodies of the last answers, at most 64, in hex
 */
#include "wire.h"

#include <poll.h>

enum { SLOTS = 256, SAMPLES = 2000000, KEPT = 64 };

struct client {
	int fd, netlink;
	uint32_t most; /* requests in flight */
	size_t (*pack)(uint8_t *out, uint32_t seq, uint32_t index, uint32_t uid, const void *body, size_t size);
	int (*parse)(const uint8_t *data, ssize_t size, struct answer *answer);
	struct sender peer; /* expected sender of answers */
	uint32_t uid, seq;
	uint8_t body[BUFFER], expected[BUFFER];
	size_t body_size, expected_size, answer_size;
	struct {
		size_t size;
		uint8_t body[MAX_PACKET];
	} kept[KEPT];
	struct {
		uint64_t since;
		uint32_t seq;
		int busy;
	} slots[SLOTS];
	uint64_t answered, refused, wrong;
	uint32_t *took;
};

static size_t pack_request(uint8_t *out, uint32_t seq, uint32_t index, uint32_t uid, const void *body, size_t size);
static int parse_response(const uint8_t *data, ssize_t size, struct answer *answer);

static struct client client = {.most = SLOTS, .pack = pack_request, .parse = parse_response};

static size_t from_hex(const char *text, uint8_t *out)
{
	size_t size = 0;
	unsigned byte;
	while (size < BUFFER && sscanf(text + 2 * size, "%2x", &byte) == 1)
		out[size++] = (uint8_t)byte;
	return size;
}

static size_t pack_request(uint8_t *out, uint32_t seq, uint32_t index, uint32_t uid, const void *body, size_t size)
{
	struct request *request = (void *)out;
	size_t all = sizeof *request + 3 + size;
	*request = (struct request){.version = VERSION, .name_len = 3, .uid = uid, .pid = (uint32_t)getpid(),
				    .deadline = now() + 9000000000};
	request->message.header = (struct nlmsghdr){.nlmsg_len = (uint32_t)all, .nlmsg_type = REQUEST, .nlmsg_seq = seq};
	request->message.index = index;
	request->message.data_len = (uint32_t)(all - sizeof request->message);
	memcpy(out + sizeof *request, "key", 3);
	memcpy(out + sizeof *request + 3, body, size);
	return all;
}

static void ask(struct client *c, uint32_t index)
{
	static uint8_t out[BUFFER];
	size_t size = c->pack(out, ++c->seq, index, c->uid, c->body, c->body_size);
	c->slots[index].seq = c->seq;
	c->slots[index].busy = 1;
	c->slots[index].since = now();
	if (send(c->fd, out, size, 0) < 0)
		die("send");
}

static ssize_t take(struct client *c, uint8_t *data)
{
	struct sender sender;
	if (!c->netlink)
		return recv(c->fd, data, BUFFER, 0);
	for (;;) {
		ssize_t size = netlink_take(c->fd, data, &sender, 0);
		if (size < 0 || (sender.who.uid == c->peer.who.uid && sender.who.pid == c->peer.who.pid))
			return size;
	}
}

static int parse_response(const uint8_t *data, ssize_t size, struct answer *answer)
{
	const struct response *response = (const void *)data;
	if (!is_response(data, size))
		return 0;
	*answer = (struct answer){.index = response->message.index, .seq = response->message.header.nlmsg_seq,
				  .refused = response->status, .body = (const uint8_t *)(response + 1),
				  .size = (size_t)size - sizeof *response};
	return 1;
}

static void keep(struct client *c, const struct answer *answer)
{
	size_t slot = c->answered % KEPT;
	c->kept[slot].size = answer->size > MAX_PACKET ? 0 : answer->size;
	memcpy(c->kept[slot].body, answer->body, c->kept[slot].size);
}

/* Receives one answer. Returns its slot, which is free again. */
static uint32_t taken(struct client *c)
{
	static uint8_t data[BUFFER];
	struct answer answer;
	for (;;) {
		ssize_t size = take(c, data);
		if (size <= 0)
			die("no answer");
		int parsed = c->parse(data, size, &answer);
		if (parsed < 0)
			continue;
		if (!parsed || answer.index >= SLOTS || !c->slots[answer.index].busy ||
		    answer.seq != c->slots[answer.index].seq) {
			c->wrong++;
			continue;
		}
		uint64_t took = now() - c->slots[answer.index].since;
		c->slots[answer.index].busy = 0;
		if (c->answered < SAMPLES)
			c->took[c->answered] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
		if (answer.refused)
			c->refused++;
		else if (answer.size != c->answer_size || memcmp(answer.body, c->expected, c->expected_size))
			c->wrong++;
		keep(c, &answer);
		c->answered++;
		return answer.index;
	}
}

static void tell_answers(const struct client *c)
{
	for (size_t i = 0; i < c->answered && i < KEPT; i++) {
		for (size_t at = 0; at < c->kept[i].size; at++)
			printf("%02x", c->kept[i].body[at]);
		putchar(' ');
	}
	putchar('\n');
}

static int by_size(const void *left, const void *right)
{
	uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
	return (a > b) - (a < b);
}

static void run(struct client *c, uint64_t count, uint32_t inflight, uint64_t milliseconds)
{
	uint64_t start = now(), end = start + milliseconds * 1000000, asked = 0;
	c->answered = c->refused = c->wrong = 0;
	for (; asked < inflight && asked < count; asked++)
		ask(c, (uint32_t)asked);
	while (c->answered < asked) {
		uint32_t index = taken(c);
		if (asked < count && now() < end) {
			ask(c, index);
			asked++;
		}
	}
	uint64_t wall = now() - start;
	size_t kept = c->answered < SAMPLES ? c->answered : SAMPLES;
	qsort(c->took, kept, sizeof *c->took, by_size);
	printf("%llu %llu %llu %u %u %u %llu\n", (unsigned long long)c->answered, (unsigned long long)c->refused,
	       (unsigned long long)c->wrong, c->took[kept / 2], c->took[kept * 99 / 100], c->took[kept * 999 / 1000],
	       (unsigned long long)wall);
}

static int obey(struct client *c)
{
	static char line[4 * BUFFER], asked[2 * BUFFER], expected[2 * BUFFER];
	struct timeval patience = {.tv_sec = 20};
	unsigned long long count, milliseconds;
	unsigned inflight;
	size_t size;
	setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	c->took = calloc(SAMPLES, sizeof *c->took);
	printf("ready %d\n", c->peer.who.pid);
	while (c->took && fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "body %s %s %zu", asked, expected, &size) == 3) {
			c->body_size = from_hex(asked, c->body);
			c->expected_size = from_hex(expected, c->expected);
			c->answer_size = size < c->expected_size ? c->expected_size : size;
			printf("ready\n");
		} else if (sscanf(line, "run %llu %u %llu", &count, &inflight, &milliseconds) == 3 && count &&
			   inflight >= 1 && inflight <= c->most) {
			run(c, count, inflight, milliseconds);
		} else if (!strcmp(line, "answers\n")) {
			tell_answers(c);
		} else {
			printf("what?\n");
		}
	}
	return 0;
}

/* Simulates the broker in FOLDER: gives one daemon a link. */
int drive_daemon(const char *folder)
{
	static uint8_t data[BUFFER];
	int registration = local_listen(folder, "registration.sock");
	struct timeval patience = {.tv_sec = 20};
	setsockopt(registration, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	int connection = accept4(registration, NULL, NULL, SOCK_CLOEXEC);
	if (connection < 0)
		die("no daemon");
	client.fd = link_give(connection);
	setsockopt(client.fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	if (!is_control(data, netlink_take(client.fd, data, &client.peer, 0), HELO))
		die("no HELO");
	client.netlink = 1;
	client.uid = client.peer.who.uid;
	if (control_send(client.fd, HELO))
		die("HELO");
	return obey(&client);
}

int drive_broker(const char *path, uint32_t uid)
{
	client.fd = local_connect(path);
	client.peer.who = local_peer(client.fd);
	client.uid = uid;
	return obey(&client);
}

/* Plays fs/ecryptfs on one end of a SEQPACKET pair, whose other end a server has in the place of /dev/ecryptfs. */
int drive_device(int fd)
{
	client.fd = fd;
	client.most = KERNEL_CONTEXTS;
	client.pack = pack_frame;
	client.parse = parse_frame;
	return obey(&client);
}

/* Floods the broker with valid requests. Reads the answers, so that the broker does not close the connection. */
int flood_with_requests(const char *path, uint32_t uid, const char *body)
{
	static uint8_t out[BUFFER], in[BUFFER];
	int fd = local_connect(path);
	uint64_t count = 0;
	client.body_size = from_hex(body, client.body);
	while (!stopped) {
		size_t size = pack_request(out, ++client.seq, 0, uid, client.body, client.body_size);
		if (send(fd, out, size, MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
			count++;
		} else if (errno != EAGAIN) {
			close(fd);
			fd = local_connect(path);
		}
		while (recv(fd, in, sizeof in, MSG_DONTWAIT) > 0)
			;
	}
	printf("%llu\n", (unsigned long long)count);
	return 0;
}

/* Holds COUNT connections; with a body, each makes requests as fast as possible and reads no answers. Replaces those
 * that the broker closes. */
int flood_with_connections(const char *path, int count, uint32_t uid, const char *body)
{
	static uint8_t out[BUFFER];
	static int held[1024];
	uint64_t made = 0, before;
	client.body_size = body ? from_hex(body, client.body) : 0;
	for (int i = 0; i < count; i++)
		held[i] = -1;
	while (!stopped) {
		before = made;
		for (int i = 0; i < count && !stopped; i++) {
			if (held[i] >= 0) {
				struct pollfd ended = {.fd = held[i], .events = POLLRDHUP};
				if (body) {
					size_t size = pack_request(out, ++client.seq, 0, uid, client.body, client.body_size);
					send(held[i], out, size, MSG_DONTWAIT | MSG_NOSIGNAL);
				}
				if (!poll(&ended, 1, 0))
					continue;
				close(held[i]);
			}
			held[i] = local_connect(path);
			made++;
		}
		if (made == before)
			usleep(1000); /* all are open: avoids measuring this loop */
	}
	printf("%llu\n", (unsigned long long)made);
	return 0;
}
