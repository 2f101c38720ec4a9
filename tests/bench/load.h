/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * load.h: what both load generators need.  All traffic stays on 127.0.0.1, and every port
 * of our own is chosen by the kernel.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	EVENTS_AT_ONCE = 512,
	METHOD_REPLY_SIZE = 2, /* VER METHOD (RFC 1928 section 3) */
	REQUEST_SIZE = 10,     /* a request, or a reply, with an IPv4 address (sections 4, 6) */
};

static const unsigned char greeting[3] = {5, 1, 0}; /* SOCKS 5, one method: none */

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static struct sockaddr_in loopback(int port)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	return address;
}

/* A socket of `type` on a free port of 127.0.0.1; the port is stored in *port. */
static int bind_loopback(int type, int *port)
{
	struct sockaddr_in address = loopback(0);
	socklen_t size = sizeof address;
	int fd = socket(AF_INET, type, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) != 0)
		die("bind");
	if (getsockname(fd, (struct sockaddr *)&address, &size) != 0)
		die("getsockname");
	*port = ntohs(address.sin_port);
	return fd;
}

/* A request for 127.0.0.1: VER CMD RSV ATYP DST.ADDR DST.PORT (RFC 1928 section 4). */
static void fill_request(unsigned char *request, int command, int port)
{
	const unsigned char bytes[REQUEST_SIZE] = {
		5, command, 0, 1, 127, 0, 0, 1, port >> 8, port & 255,
	};
	memcpy(request, bytes, sizeof bytes);
}

static void set_nodelay(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* The child's pid in the parent, 0 in the child, which will not outlive the parent. */
static pid_t fork_origin(void)
{
	pid_t parent = getpid();
	pid_t child = fork();

	if (child < 0)
		die("fork");
	if (child > 0)
		return child;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	return 0;
}

static void end_origin(pid_t origin)
{
	kill(origin, SIGKILL);
	waitpid(origin, NULL, 0);
}
