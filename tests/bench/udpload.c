/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * udpload: UDP echoes through a SOCKS 5 server on 127.0.0.1, with the echo server built in.
 *
 *   udpload PORT ASSOCIATIONS WINDOW SECONDS
 *
 * Each association keeps WINDOW datagrams of 64 bytes in flight, each in its own slot.  A
 * datagram not back after LOST_SECONDS counts as lost and its slot is used anew; the
 * generation in it tells a late echo from the one awaited.  The result is one line of JSON.
 */
#include "load.h"

enum {
	CMD_UDP_ASSOCIATE = 3,
	HEADER_SIZE = 10, /* RSV RSV FRAG ATYP DST.ADDR DST.PORT (RFC 1928 section 7) */
	PAYLOAD_SIZE = 64,
	BUFFER_BYTES = 4 << 20,
	CONTROL_SECONDS = 5,
};
static const double LOST_SECONDS = 0.25;

struct slot {
	unsigned generation;
	double sent; /* 0: nothing in flight */
};

struct datagram {
	unsigned char header[HEADER_SIZE];
	unsigned slot, generation;
	unsigned char filling[PAYLOAD_SIZE - 2 * sizeof(unsigned)];
} __attribute__((packed));

static int proxy_port, echo_port, associations, window, epoll_fd;
static int *relays;       /* one connected UDP socket for each association */
static struct slot *slots; /* `window` of them for each association */
static long sent, echoed, lost, late;

static void widen_buffers(int fd)
{
	int size = BUFFER_BYTES;

	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

static void serve_echo(int fd)
{
	char buffer[2048];
	struct sockaddr_in peer;

	for (;;) {
		socklen_t size = sizeof peer;
		ssize_t count = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&peer, &size);

		if (count >= 0)
			sendto(fd, buffer, count, 0, (struct sockaddr *)&peer, size);
	}
}

static pid_t start_echo(void)
{
	int fd = bind_loopback(SOCK_DGRAM, &echo_port);
	pid_t child;

	widen_buffers(fd);
	child = fork_origin();
	if (child == 0)
		serve_echo(fd);
	close(fd);
	return child;
}

static void refuse(const char *why)
{
	fprintf(stderr, "udpload: %s\n", why);
	exit(1);
}

static void receive_exactly(int fd, void *data, size_t size)
{
	if (recv(fd, data, size, MSG_WAITALL) != (ssize_t)size)
		refuse("the control connection ended or timed out");
}

/* Ask for an association; its relay address is stored.  The control connection stays open. */
static void associate(struct sockaddr_in *relay)
{
	struct sockaddr_in proxy = loopback(proxy_port);
	struct timeval limit = {.tv_sec = CONTROL_SECONDS};
	unsigned char message[REQUEST_SIZE] = {5, CMD_UDP_ASSOCIATE, 0, 1};
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	set_nodelay(fd);
	if (connect(fd, (struct sockaddr *)&proxy, sizeof proxy) != 0)
		die("connect");
	send(fd, greeting, sizeof greeting, MSG_NOSIGNAL);
	receive_exactly(fd, message + 4, METHOD_REPLY_SIZE);
	memset(message + 4, 0, METHOD_REPLY_SIZE);
	send(fd, message, sizeof message, MSG_NOSIGNAL);
	receive_exactly(fd, message, sizeof message);
	if (message[1] != 0 || message[3] != 1)
		refuse("the association was refused");
	*relay = loopback(0);
	memcpy(&relay->sin_port, message + 8, sizeof relay->sin_port);
}

static int open_relay(int association)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = association};
	struct sockaddr_in relay;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

	associate(&relay);
	widen_buffers(fd);
	if (connect(fd, (struct sockaddr *)&relay, sizeof relay) != 0)
		die("connect to the relay");
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
		die("epoll_ctl");
	return fd;
}

static void send_slot(int association, unsigned number)
{
	struct slot *slot = &slots[association * window + number];
	struct datagram datagram = {.slot = number, .generation = ++slot->generation};

	/* The header of a datagram has the layout of a request but for VER and CMD. */
	fill_request(datagram.header, 0, echo_port);
	datagram.header[0] = 0;
	slot->sent = now();
	if (send(relays[association], &datagram, sizeof datagram, 0) == sizeof datagram)
		sent++;
}

/* Count one echo; true when its slot is free for the next datagram. */
static bool count_echo(int association, const struct datagram *datagram)
{
	struct slot *slot;

	if (datagram->slot >= (unsigned)window)
		refuse("an echo came back damaged");
	slot = &slots[association * window + datagram->slot];
	if (datagram->generation != slot->generation || slot->sent == 0) {
		late++;
		return false;
	}
	slot->sent = 0;
	echoed++;
	return true;
}

static void take_echoes(int association, bool resend)
{
	struct datagram datagram;

	while (recv(relays[association], &datagram, sizeof datagram, 0) == sizeof datagram)
		if (count_echo(association, &datagram) && resend)
			send_slot(association, datagram.slot);
}

static void poll_once(int timeout_ms, bool resend)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	int count = epoll_wait(epoll_fd, events, EVENTS_AT_ONCE, timeout_ms);

	for (int i = 0; i < count; i++)
		take_echoes(events[i].data.u32, resend);
}

static void replace_lost(void)
{
	double limit = now() - LOST_SECONDS;

	for (int i = 0; i < associations * window; i++) {
		if (slots[i].sent == 0 || slots[i].sent > limit)
			continue;
		lost++;
		send_slot(i / window, i % window);
	}
}

static long in_flight(void)
{
	long count = 0;

	for (int i = 0; i < associations * window; i++)
		count += slots[i].sent != 0;
	return count;
}

static void open_all(void)
{
	epoll_fd = epoll_create1(0);
	relays = calloc(associations, sizeof *relays);
	slots = calloc((size_t)associations * window, sizeof *slots);
	if (epoll_fd < 0 || relays == NULL || slots == NULL)
		die("open_all");
	for (int i = 0; i < associations; i++)
		relays[i] = open_relay(i);
}

/* Echoes per second; what is still in flight at the end gets LOST_SECONDS to come home. */
static double run(double seconds)
{
	double start = now(), sweep = start, elapsed, rate;

	for (int i = 0; i < associations * window; i++)
		send_slot(i / window, i % window);
	while (now() < start + seconds) {
		poll_once(50, true);
		if (now() < sweep + LOST_SECONDS)
			continue;
		sweep = now();
		replace_lost();
	}
	elapsed = now() - start;
	rate = echoed / elapsed;
	while (in_flight() > 0 && now() < start + elapsed + LOST_SECONDS)
		poll_once(50, false);
	lost += in_flight();
	return rate;
}

int main(int argc, char **argv)
{
	pid_t echo;
	double rate;

	if (argc != 5) {
		fprintf(stderr, "usage: udpload PORT ASSOCIATIONS WINDOW SECONDS\n");
		return 2;
	}
	proxy_port = atoi(argv[1]);
	associations = atoi(argv[2]);
	window = atoi(argv[3]);
	echo = start_echo();
	open_all();
	rate = run(atof(argv[4]));
	printf("{\"per_second\": %.1f, \"done\": %ld, \"lost\": %ld, \"late\": %ld, "
	       "\"loss_percent\": %.4f}\n",
	       rate, echoed, lost, late, sent > 0 ? 100.0 * lost / sent : 0.0);
	end_origin(echo);
	return 0;
}
