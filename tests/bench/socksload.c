/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * socksload: TCP load for a SOCKS 5 server on 127.0.0.1, with the origin server built in.
 *
 *   socksload rate  PORT SESSIONS SECONDS       connect, CONNECT, one byte each way, close
 *   socksload orderly PORT SESSIONS SECONDS     the same, but the origin closes in order
 *   socksload login PORT SESSIONS SECONDS       the same as rate, by user name and password
 *   socksload http  PORT SESSIONS SECONDS       the same as rate, by HTTP's CONNECT
 *   socksload ping  PORT SESSIONS SECONDS       64-byte round trips over sessions that stay
 *   socksload bulk  PORT SESSIONS SECONDS       download as fast as it comes
 *   socksload idle  PORT SESSIONS SECONDS       open as many as each line of stdin says, hold
 *   socksload churn PORT SESSIONS SECONDS RATE  start RATE a second, each ending in another way
 *
 * The origin answers the end of a session by a reset, except in the modes orderly and churn:
 * else the server's side of each session would stay in TIME_WAIT for a minute, and a server
 * that binds before it connects (danted) would have used up the 28,232 ports of Linux after
 * some seconds.  Then the rate would tell what had run before rather than how fast it is.
 *
 * SESSIONS is how many are open at a time (idle: at most).  In idle mode SECONDS bounds each
 * step, and the end of stdin ends the program.  Each result is one line of JSON.
 */
#include "load.h"

enum {
	CMD_CONNECT = 1,
	MESSAGE_SIZE = 64,
	HEAD_SIZE = 512,        /* of an answer to HTTP's CONNECT, at most */
	STATUS_SIZE = 2,        /* VER STATUS (RFC 1929 section 2) */
	NO_METHOD = 0,
	PASSWORD_METHOD = 2,
	SOURCE_CHUNK = 256 * 1024,
	SINK_CHUNK = 1024 * 1024,
	CLOSED_PORT = 1,        /* tcpmux: nobody listens there */
	QUIT = 'q',             /* asks the origin to close first */
	IDLE_WINDOW = 256,      /* sessions under way at once while idle ones are opened */
	ERRORS_MAX = 200 * 1000,
	LATENCIES_MAX = 4 * 1000 * 1000,
	DRAIN_SECONDS = 5,
};

enum mode { RATE, ORDERLY, LOGIN, HTTP, PING, BULK, IDLE, CHURN };
static const char *const mode_names[] = {
	"rate", "orderly", "login", "http", "ping", "bulk", "idle", "churn",
};

/* RFC 1929 section 2: VER, and user name and password with their lengths. */
static const char login[] = "\1\5bench\5bench";

/* How a session of a churn run ends; they take turns. */
enum ending {
	BY_RESET,      /* echo one byte, reset */
	BY_CLOSE,      /* echo one byte, close in order */
	BY_HALF_CLOSE, /* echo one byte, shut down the sending side, await the end */
	BY_TARGET,     /* the target closes first */
	BY_REFUSAL,    /* the target refuses the connection */
	IN_GREETING,   /* close in the middle of the greeting */
	IN_REQUEST,    /* close without waiting for the reply */
	ENDINGS,
};

enum state { CONNECTING, AWAIT_METHOD, AWAIT_STATUS, AWAIT_HEAD, AWAIT_REPLY, AWAIT_ECHO, STREAMING, AWAIT_END, HELD };

/* What a handler tells the loop to do with its session. */
enum outcome { GO_ON, FINISHED, FAILED };

struct session {
	int fd;
	enum state state;
	enum ending ending;
	size_t got; /* bytes of the awaited message in `message` */
	unsigned char message[HEAD_SIZE];
	double began;
};

static enum mode mode;
static int proxy_port, origin_port, epoll_fd;
static struct session *sessions;
static struct session **spare; /* sessions not in use, a stack */
static int sessions_max, spare_count;
static long started, established, finished, errors;
static double bytes_read;
static double *latencies;
static long latency_count;

/* ---- the origin server: echoes, or is a source of bytes ---- */

static void watch(int epoll, int operation, int fd, unsigned events, void *data)
{
	struct epoll_event event = {.events = events};

	if (data != NULL)
		event.data.ptr = data;
	else
		event.data.fd = fd;
	if (epoll_ctl(epoll, operation, fd, &event) != 0)
		die("epoll_ctl");
}

/* Let close() send a reset, which leaves no TIME_WAIT behind on either side. */
static void arm_reset(int fd)
{
	struct linger at_once = {.l_onoff = 1, .l_linger = 0};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
}

static void origin_accept(int epoll, int listener, unsigned events)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		set_nodelay(fd);
		if (mode != ORDERLY && mode != CHURN)
			arm_reset(fd);
		watch(epoll, EPOLL_CTL_ADD, fd, events, NULL);
	}
}

static void origin_echo(int fd)
{
	char buffer[4096];
	ssize_t size = read(fd, buffer, sizeof buffer);

	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0 || buffer[0] == QUIT || send(fd, buffer, size, MSG_NOSIGNAL) < 0)
		close(fd);
}

static void origin_pour(int fd, unsigned events)
{
	static const char chunk[SOURCE_CHUNK];

	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		close(fd);
	else if (send(fd, chunk, sizeof chunk, MSG_NOSIGNAL) < 0 && errno != EAGAIN)
		close(fd);
}

static void serve_origin(int listener)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	unsigned wanted = mode == BULK ? EPOLLOUT | EPOLLRDHUP : EPOLLIN;
	int epoll = epoll_create1(0);

	watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS_AT_ONCE, -1);

		for (int i = 0; i < count; i++) {
			if (events[i].data.fd == listener)
				origin_accept(epoll, listener, wanted);
			else if (mode == BULK)
				origin_pour(events[i].data.fd, events[i].events);
			else
				origin_echo(events[i].data.fd);
		}
	}
}

static pid_t start_origin(void)
{
	int listener = bind_loopback(SOCK_STREAM | SOCK_NONBLOCK, &origin_port);
	pid_t child;

	if (listen(listener, 8192) != 0)
		die("listen");
	child = fork_origin();
	if (child == 0)
		serve_origin(listener);
	close(listener);
	return child;
}

/* ---- one session ---- */

static void begin(struct session *s)
{
	struct sockaddr_in proxy = loopback(proxy_port);

	s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (s->fd < 0)
		die("socket");
	s->state = CONNECTING;
	s->ending = mode == CHURN ? started % ENDINGS : BY_RESET;
	s->got = 0;
	s->began = now();
	started++;
	set_nodelay(s->fd);
	if (s->ending == BY_RESET)
		arm_reset(s->fd);
	/* Whatever connect says, the first event tells the outcome. */
	(void)connect(s->fd, (struct sockaddr *)&proxy, sizeof proxy);
	watch(epoll_fd, EPOLL_CTL_ADD, s->fd, EPOLLOUT, s);
}

static void await(struct session *s, enum state state)
{
	s->state = state;
	s->got = 0;
}

static enum outcome send_all(struct session *s, const void *data, size_t size)
{
	return send(s->fd, data, size, MSG_NOSIGNAL) == (ssize_t)size ? GO_ON : FAILED;
}

static enum outcome send_message(struct session *s, unsigned char first, size_t size)
{
	unsigned char message[MESSAGE_SIZE] = {first};

	return send_all(s, message, size);
}

/* FINISHED when `size` bytes of the awaited message are here, GO_ON while some are missing. */
static enum outcome gather(struct session *s, size_t size)
{
	ssize_t count = read(s->fd, s->message + s->got, size - s->got);

	if (count < 0 && errno == EAGAIN)
		return GO_ON;
	if (count <= 0)
		return FAILED;
	s->got += count;
	return s->got == size ? FINISHED : GO_ON;
}

static enum outcome send_greeting(struct session *s)
{
	unsigned char message[sizeof greeting];

	memcpy(message, greeting, sizeof message);
	if (mode == LOGIN)
		message[2] = PASSWORD_METHOD;
	return send_all(s, message, sizeof message);
}

static enum outcome ask_by_http(struct session *s)
{
	char text[HEAD_SIZE];
	int size = snprintf(text, sizeof text,
			    "CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n",
			    origin_port, origin_port);

	await(s, AWAIT_HEAD);
	return send_all(s, text, size);
}

static enum outcome on_connected(struct session *s)
{
	int error = 0;
	socklen_t size = sizeof error;

	getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (error != 0)
		return FAILED;
	watch(epoll_fd, EPOLL_CTL_MOD, s->fd, EPOLLIN, s);
	if (mode == HTTP)
		return ask_by_http(s);
	await(s, AWAIT_METHOD);
	if (s->ending == IN_GREETING)
		return send_all(s, greeting, 1) == GO_ON ? FINISHED : FAILED;
	return send_greeting(s);
}

static enum outcome request(struct session *s)
{
	unsigned char request[REQUEST_SIZE];

	fill_request(request, CMD_CONNECT, s->ending == BY_REFUSAL ? CLOSED_PORT : origin_port);
	await(s, AWAIT_REPLY);
	if (send_all(s, request, sizeof request) == FAILED)
		return FAILED;
	return s->ending == IN_REQUEST ? FINISHED : GO_ON;
}

static enum outcome on_method(struct session *s)
{
	enum outcome outcome = gather(s, METHOD_REPLY_SIZE);

	if (outcome != FINISHED)
		return outcome;
	if (s->message[1] != (mode == LOGIN ? PASSWORD_METHOD : NO_METHOD))
		return FAILED;
	if (mode != LOGIN)
		return request(s);
	await(s, AWAIT_STATUS);
	return send_all(s, login, sizeof login - 1);
}

static enum outcome on_status(struct session *s)
{
	enum outcome outcome = gather(s, STATUS_SIZE);

	if (outcome != FINISHED)
		return outcome;
	return s->message[1] == 0 ? request(s) : FAILED;
}

static enum outcome use(struct session *s)
{
	switch (mode) {
	case IDLE:
		await(s, HELD);
		return GO_ON;
	case BULK:
		await(s, STREAMING);
		return GO_ON;
	case PING:
		s->began = now();
		await(s, AWAIT_ECHO);
		return send_message(s, 1, MESSAGE_SIZE);
	default:
		await(s, s->ending == BY_TARGET ? AWAIT_END : AWAIT_ECHO);
		return send_message(s, s->ending == BY_TARGET ? QUIT : 1, 1);
	}
}

static enum outcome on_reply(struct session *s)
{
	enum outcome outcome = gather(s, REQUEST_SIZE);

	if (outcome != FINISHED)
		return outcome;
	if (s->ending == BY_REFUSAL)
		return s->message[1] != 0 ? FINISHED : FAILED;
	if (s->message[1] != 0)
		return FAILED;
	established++;
	return use(s);
}

/* The head ends with an empty line; nothing comes behind it before we have sent something. */
static enum outcome on_head(struct session *s)
{
	ssize_t count = read(s->fd, s->message + s->got, HEAD_SIZE - s->got);

	if (count < 0 && errno == EAGAIN)
		return GO_ON;
	if (count <= 0)
		return FAILED;
	s->got += count;
	if (s->got < 4 || memcmp(s->message + s->got - 4, "\r\n\r\n", 4) != 0)
		return s->got < HEAD_SIZE ? GO_ON : FAILED;
	if (s->got < 12 || memcmp(s->message + 9, "200", 3) != 0)
		return FAILED;
	established++;
	return use(s);
}

static void note_latency(double seconds)
{
	if (latency_count < LATENCIES_MAX)
		latencies[latency_count++] = seconds;
}

static enum outcome on_echo(struct session *s)
{
	enum outcome outcome = gather(s, mode == PING ? MESSAGE_SIZE : 1);

	if (outcome != FINISHED)
		return outcome;
	note_latency(now() - s->began);
	if (s->ending == BY_HALF_CLOSE) {
		await(s, AWAIT_END);
		return shutdown(s->fd, SHUT_WR) == 0 ? GO_ON : FAILED;
	}
	if (mode != PING)
		return FINISHED;
	finished++;
	return use(s);
}

static enum outcome on_stream(struct session *s)
{
	static char chunk[SINK_CHUNK];
	ssize_t count = read(s->fd, chunk, sizeof chunk);

	if (count <= 0)
		return FAILED;
	bytes_read += count;
	return GO_ON;
}

static enum outcome on_end(struct session *s)
{
	char byte;

	return read(s->fd, &byte, 1) == 0 ? FINISHED : FAILED;
}

static enum outcome on_held(struct session *s)
{
	(void)s; /* A held session hears nothing but its end. */
	return FAILED;
}

static enum outcome (*const handlers[])(struct session *) = {
	[CONNECTING] = on_connected,
	[AWAIT_METHOD] = on_method,
	[AWAIT_STATUS] = on_status,
	[AWAIT_HEAD] = on_head,
	[AWAIT_REPLY] = on_reply,
	[AWAIT_ECHO] = on_echo,
	[STREAMING] = on_stream,
	[AWAIT_END] = on_end,
	[HELD] = on_held,
};

/* ---- the loops ---- */

static bool repeats(void)
{
	return mode != IDLE && mode != CHURN;
}

static void settle(struct session *s, enum outcome outcome)
{
	if (outcome == FINISHED)
		finished++;
	else
		errors++;
	close(s->fd);
	if (repeats())
		begin(s);
	else
		spare[spare_count++] = s;
}

static void poll_once(int timeout_ms)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	int count = epoll_wait(epoll_fd, events, EVENTS_AT_ONCE, timeout_ms);

	for (int i = 0; i < count; i++) {
		struct session *s = events[i].data.ptr;
		enum outcome outcome = handlers[s->state](s);

		if (outcome != GO_ON)
			settle(s, outcome);
	}
}

static void begin_spare(void)
{
	begin(spare[--spare_count]);
}

static double run_closed_loops(double seconds)
{
	double start = now();

	while (spare_count > 0)
		begin_spare();
	while (now() < start + seconds && errors < ERRORS_MAX)
		poll_once(100);
	return now() - start;
}

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double percentile_ms(int percent)
{
	return latency_count == 0 ? 0 : latencies[(latency_count - 1) * percent / 100] * 1e3;
}

static void run_rate(double seconds)
{
	double elapsed = run_closed_loops(seconds);

	qsort(latencies, latency_count, sizeof *latencies, by_size);
	printf("{\"per_second\": %.1f, \"done\": %ld, \"errors\": %ld, "
	       "\"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f}\n",
	       finished / elapsed, finished, errors,
	       percentile_ms(50), percentile_ms(99), percentile_ms(100));
}

static void run_bulk(double seconds)
{
	double elapsed = run_closed_loops(seconds);

	printf("{\"mb_per_second\": %.2f, \"bytes\": %.0f, \"errors\": %ld}\n",
	       bytes_read / elapsed / 1e6, bytes_read, errors);
}

/* Open sessions until `goal` have been tried and answered; at most IDLE_WINDOW at once. */
static void open_until(long goal, double seconds)
{
	double start = now();

	while (established + errors < goal && now() < start + seconds) {
		while (started < goal && started - established - errors < IDLE_WINDOW)
			begin_spare();
		poll_once(100);
	}
	printf("{\"established\": %ld, \"errors\": %ld, \"seconds\": %.3f}\n",
	       established, errors, now() - start);
	fflush(stdout);
}

static void run_idle(double seconds)
{
	char line[32];

	while (fgets(line, sizeof line, stdin) != NULL) {
		long goal = atol(line);

		open_until(goal < sessions_max ? goal : sessions_max, seconds);
	}
}

static void run_churn(double seconds, double per_second)
{
	double start = now(), end = start + seconds;

	while (now() < end) {
		while (spare_count > 0 && started < per_second * (now() - start))
			begin_spare();
		poll_once(2);
	}
	while (spare_count < sessions_max && now() < end + DRAIN_SECONDS)
		poll_once(100);
	printf("{\"done\": %ld, \"errors\": %ld, \"unfinished\": %d}\n",
	       finished, errors, sessions_max - spare_count);
}

static void prepare(void)
{
	epoll_fd = epoll_create1(0);
	sessions = calloc(sessions_max, sizeof *sessions);
	spare = calloc(sessions_max, sizeof *spare);
	latencies = malloc(LATENCIES_MAX * sizeof *latencies);
	if (epoll_fd < 0 || sessions == NULL || spare == NULL || latencies == NULL)
		die("prepare");
	for (int i = 0; i < sessions_max; i++)
		spare[spare_count++] = &sessions[i];
}

static enum mode find_mode(const char *name)
{
	for (enum mode m = RATE; m <= CHURN; m++)
		if (strcmp(name, mode_names[m]) == 0)
			return m;
	fprintf(stderr, "socksload: no mode \"%s\"\n", name);
	exit(2);
}

int main(int argc, char **argv)
{
	double seconds;
	pid_t origin;

	if (argc < 5) {
		fprintf(stderr, "usage: socksload MODE PORT SESSIONS SECONDS [RATE]\n");
		return 2;
	}
	mode = find_mode(argv[1]);
	proxy_port = atoi(argv[2]);
	sessions_max = atoi(argv[3]);
	seconds = atof(argv[4]);
	origin = start_origin();
	prepare();
	if (mode == BULK)
		run_bulk(seconds);
	else if (mode == IDLE)
		run_idle(seconds);
	else if (mode == CHURN)
		run_churn(seconds, argc > 5 ? atof(argv[5]) : 100);
	else
		run_rate(seconds);
	end_origin(origin);
	return 0;
}
