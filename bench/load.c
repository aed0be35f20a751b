/*
 * The load and the backend of `make bench`: one epoll loop each, one thread, nothing else.
 *
 *   load backend LISTENERS [SIZE]               prints their ports, then serves until its standard input ends; whatever
 *                                               is written there is answered by a line: connections accepted by each
 *   load connections PORT COUNT AT_A_TIME [FILE]   connect, a request, its answer, close
 *   load requests PORT COUNT CONNECTIONS        requests over connections that stay open, each after the answer before
 *   load rate PORT COUNT CONNECTIONS PER_SECOND requests at a fixed rate, whether or not there are answers
 *   load down PORT BYTES STREAMS                receive so many bytes over each stream, up to the end of it
 *   load up PORT BYTES STREAMS                  send so many bytes over each stream, until the backend has them
 *   load hold PORT COUNT                        connections with one request each; then open until standard input ends
 *   load beside PORT COUNT CONNECTIONS          new connections, all at once, beside connections that ask without a pause
 *   load beside-down PORT COUNT STREAMS         the same beside streams that are received without an end
 *
 * A client prints one line of JSON: seconds from the first connect to the last answer, its own CPU seconds, and for
 * `rate` and `beside` the latencies in seconds. `beside` has more: see there. What does not arrive is an error: one
 * line on stderr, exit code 1.
 *
 * The protocol: a request is 64 bytes, `ask`, `down BYTES` or `up BYTES`, filled with spaces. `ask` is answered by 256
 * bytes and may be repeated; `down` by so many bytes and the end of the stream; `up` is followed by so many bytes and
 * answered by 4. With SIZE, a request has so many bytes; with FILE, it is what the file holds, as long as that is.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST = 64, REQUEST_MAX = 2048, ANSWER = 256, DONE = 4, CHUNK = 1 << 18, PATIENCE = 10, OPENING = 64, EVENTS = 256, TURN = 16 };

static char chunk[CHUNK]; /* what is sent */
static char waste[CHUNK]; /* what is received: counted, not looked at */
static int epoll_fd;
static int request_size = REQUEST;

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static void must(int result, const char *what)
{
    if (result < 0)
        fail("%s: %s", what, strerror(errno));
}

static double seconds_of(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static double now(void)
{
    return seconds_of(CLOCK_MONOTONIC);
}

static void watch_in(int epoll, int operation, int fd, uint32_t events, uint64_t tag)
{
    struct epoll_event event = {.events = events, .data.u64 = tag};
    must(epoll_ctl(epoll, operation, fd, &event), "epoll_ctl");
}

static void watch(int operation, int fd, uint32_t events, uint64_t tag)
{
    watch_in(epoll_fd, operation, fd, events, tag);
}

static void no_delay(int fd)
{
    int on = 1;
    must(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "TCP_NODELAY");
}

static struct sockaddr_in loopback(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

/* -- the backend ------------------------------------------------------------------------------------------------ */

struct served {
    char request[REQUEST_MAX];
    int filled;           /* bytes of the request so far */
    enum { ASKING, SENDING, RECEIVING } state;
    long long left;       /* bytes to send or to receive */
};

/* Downloads have an epoll of their own: at most TURN of them go on before the others are looked at again. */
static int senders;

static void serve(int fd, struct served *one)
{
    ssize_t count;
    if (one->state == SENDING) {
        count = send(fd, chunk, one->left < CHUNK ? one->left : CHUNK, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0 || !(one->left -= count))
            close(fd);
        return;
    }
    if (one->state == RECEIVING) {
        count = recv(fd, waste, CHUNK, 0);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count <= 0) {
            close(fd);
        } else if ((one->left -= count) <= 0) {
            one->state = ASKING;
            if (send(fd, chunk, DONE, MSG_NOSIGNAL) != DONE)
                close(fd);
        }
        return;
    }
    count = recv(fd, one->request + one->filled, request_size - one->filled, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {
        close(fd);
        return;
    }
    if ((one->filled += count) < request_size)
        return;
    one->filled = 0;
    if (one->request[0] == 'd') {
        one->state = SENDING;
        one->left = strtoll(one->request + 5, NULL, 10);
        watch(EPOLL_CTL_DEL, fd, 0, 0);
        watch_in(senders, EPOLL_CTL_ADD, fd, EPOLLOUT, fd);
    } else if (one->request[0] == 'u') {
        one->state = RECEIVING;
        one->left = strtoll(one->request + 3, NULL, 10);
    } else if (send(fd, chunk, ANSWER, MSG_NOSIGNAL) != ANSWER) {
        close(fd);
    }
}

static int backend(int listeners)
{
    struct rlimit limit;
    must(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
    struct served *all = calloc(limit.rlim_cur, sizeof *all);
    int *listener_of = calloc(limit.rlim_cur, sizeof *listener_of); /* from 1; 0: not a listener */
    long *connections = calloc(listeners + 1, sizeof *connections);
    senders = epoll_create1(0);
    watch(EPOLL_CTL_ADD, senders, EPOLLIN, senders);
    watch(EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, STDIN_FILENO);
    for (int i = 0; i < listeners; i++) {
        struct sockaddr_in address = loopback(0);
        socklen_t size = sizeof address;
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        must(bind(fd, (struct sockaddr *)&address, size), "bind");
        must(listen(fd, 4096), "listen");
        must(getsockname(fd, (struct sockaddr *)&address, &size), "getsockname");
        printf("%d\n", ntohs(address.sin_port));
        listener_of[fd] = i + 1;
        watch(EPOLL_CTL_ADD, fd, EPOLLIN, fd);
    }
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.u64;
            if (fd == STDIN_FILENO) {
                if (read(STDIN_FILENO, waste, CHUNK) <= 0)
                    return 0;
                for (int one = 1; one <= listeners; one++)
                    printf("%ld%c", connections[one], one < listeners ? ' ' : '\n');
                fflush(stdout);
                continue;
            }
            if (fd == senders) {
                struct epoll_event turn[TURN];
                int ready = epoll_wait(senders, turn, TURN, 0);
                for (int k = 0; k < ready; k++)
                    serve(turn[k].data.u64, &all[turn[k].data.u64]);
                continue;
            }
            if (!listener_of[fd]) {
                serve(fd, &all[fd]);
                continue;
            }
            int accepted;
            while ((accepted = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                connections[listener_of[fd]]++;
                no_delay(accepted);
                all[accepted].filled = 0;
                all[accepted].state = ASKING;
                watch(EPOLL_CTL_ADD, accepted, EPOLLIN, accepted);
            }
        }
    }
}

/* -- the clients ------------------------------------------------------------------------------------------------ */

struct client {
    int fd;
    int asked;            /* whether the request has been sent */
    long long to_send;    /* after the request */
    long long to_receive; /* -1: up to the end of the stream */
    long long received;
    long number;          /* of the request */
};

static int port, clients;
static struct client *all;
static char request[REQUEST_MAX];

static void ask(struct client *one)
{
    one->asked = send(one->fd, request, request_size, MSG_NOSIGNAL) == request_size;
    if (!one->asked && errno != EAGAIN && errno != ENOTCONN)
        fail("the proxy does not take a request: %s", strerror(errno));
}

/* Connect and ask; what the handshake does not allow yet is done once the socket is writable. */
static void start(struct client *one)
{
    struct sockaddr_in address = loopback(port);
    one->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    must(one->fd, "socket");
    no_delay(one->fd);
    if (connect(one->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        fail("the proxy cannot be reached: %s", strerror(errno));
    one->received = 0;
    ask(one);
    watch(EPOLL_CTL_ADD, one->fd, EPOLLIN | (!one->asked || one->to_send ? EPOLLOUT : 0), one - all);
}

/* Go on with a client. Returns 1 when it has its answer. */
static int go_on(struct client *one, uint32_t events)
{
    if (events & EPOLLOUT) {
        if (!one->asked) {
            ask(one);
        } else if (one->to_send) {
            ssize_t count = send(one->fd, chunk, one->to_send < CHUNK ? one->to_send : CHUNK, MSG_NOSIGNAL);
            if (count < 0 && errno != EAGAIN)
                fail("sending, %lld bytes before the end: %s", one->to_send, strerror(errno));
            one->to_send -= count > 0 ? count : 0;
        }
        if (one->asked && !one->to_send)
            watch(EPOLL_CTL_MOD, one->fd, EPOLLIN, one - all);
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return 0;
    ssize_t count = recv(one->fd, waste, CHUNK, 0);
    if (count < 0 && errno == EAGAIN)
        return 0;
    if (count < 0)
        fail("receiving, after %lld bytes: %s", one->received, strerror(errno));
    if (!count && one->to_receive >= 0)
        fail("expected an answer of %lld bytes, got %lld", one->to_receive, one->received);
    one->received += count;
    return !count || one->received == one->to_receive;
}

static int wait_for(struct epoll_event *events, int most, double patience)
{
    struct timespec timeout = {.tv_sec = (time_t)patience, .tv_nsec = (patience - (time_t)patience) * 1e9};
    int count = epoll_pwait2(epoll_fd, events, most, &timeout, NULL);
    if (count < 0 && errno == EINTR)
        return 0;
    must(count, "epoll_pwait2");
    return count;
}

static int wait_for_answers(struct epoll_event *events, long done, long wanted)
{
    int count = wait_for(events, EVENTS, PATIENCE);
    if (!count)
        fail("expected %ld answers, got %ld, then none for %d s", wanted, done, PATIENCE);
    return count;
}

static void report(double seconds, const char *more)
{
    printf("{\"seconds\": %.9f, \"cpu\": %.9f%s}\n", seconds, seconds_of(CLOCK_PROCESS_CPUTIME_ID), more);
    fflush(stdout);
}

/* `again`: what a client does that has its answer. */
static void answers(long wanted, void (*again)(struct client *), long started)
{
    struct epoll_event events[EVENTS];
    for (long done = 0; done < wanted;) {
        int count = wait_for_answers(events, done, wanted);
        for (int i = 0; i < count; i++) {
            struct client *one = &all[events[i].data.u64];
            if (!go_on(one, events[i].events))
                continue;
            done++;
            if (started < wanted) {
                started++;
                again(one);
            } else {
                close(one->fd);
            }
        }
    }
}

static void reconnect(struct client *one)
{
    close(one->fd);
    start(one);
}

static void ask_again(struct client *one)
{
    one->received = 0;
    ask(one);
}

/* Opening: no more at a time than fit into a short backlog. */
static void open_all(void)
{
    struct epoll_event events[EVENTS];
    for (int opened = 0, done = 0; done < clients;) {
        for (; opened < clients && opened - done < OPENING; opened++)
            start(&all[opened]);
        int count = wait_for_answers(events, done, clients);
        for (int i = 0; i < count; i++)
            done += go_on(&all[events[i].data.u64], events[i].events);
    }
}

static void bulk(int download, long long bytes)
{
    struct epoll_event events[EVENTS];
    snprintf(request, REQUEST, download ? "down %lld" : "up %lld", bytes);
    double began = now();
    for (int i = 0; i < clients; i++) {
        all[i].to_send = download ? 0 : bytes;
        all[i].to_receive = download ? -1 : DONE;
        start(&all[i]);
    }
    for (int done = 0; done < clients;) {
        int count = wait_for_answers(events, done, clients);
        for (int i = 0; i < count; i++) {
            struct client *one = &all[events[i].data.u64];
            if (!go_on(one, events[i].events))
                continue;
            if (download && one->received != bytes)
                fail("expected %lld bytes, got %lld", bytes, one->received);
            close(one->fd);
            done++;
        }
    }
    report(now() - began, "");
}

static int by_size(const void *a, const void *b)
{
    double difference = *(const double *)a - *(const double *)b;
    return (difference > 0) - (difference < 0);
}

/* The latencies, and what else there is to say. */
static void report_latencies(double seconds, double *latency, long count, const char *more)
{
    char text[512];
    qsort(latency, count, sizeof *latency, by_size);
    /* The smallest latency that so many of all requests do not exceed. */
    long p50 = (count * 50 + 99) / 100 - 1, p99 = (count * 99 + 99) / 100 - 1;
    snprintf(text, sizeof text, ", \"p50\": %.9f, \"p99\": %.9f, \"max\": %.9f%s", latency[p50], latency[p99],
             latency[count - 1], more);
    report(seconds, text);
}

/* Latency counts from when a request was due: one that waits for a free connection has been waiting already. */
static void rate(long count, double per_second)
{
    struct epoll_event events[EVENTS];
    struct client **idle = calloc(clients, sizeof *idle);
    double *latency = calloc(count, sizeof *latency);
    int idles = 0;
    open_all();
    for (int i = 0; i < clients; i++)
        idle[idles++] = &all[i];
    prctl(PR_SET_TIMERSLACK, 1);
    double began = now() + 0.001;
    for (long issued = 0, done = 0; done < count;) {
        double wait = PATIENCE;
        while (idles && issued < count && (wait = began + issued / per_second - now()) <= 0) {
            struct client *one = idle[--idles];
            one->number = issued++;
            ask_again(one);
        }
        if (!idles || issued == count)
            wait = PATIENCE;
        int ready = wait_for(events, EVENTS, wait);
        if (!ready && wait == PATIENCE)
            fail("expected %ld answers, got %ld, then none for %d s", count, done, PATIENCE);
        for (int i = 0; i < ready; i++) {
            struct client *one = &all[events[i].data.u64];
            if (!go_on(one, events[i].events))
                continue;
            latency[one->number] = now() - (began + one->number / per_second);
            idle[idles++] = one;
            done++;
        }
    }
    report_latencies(now() - began, latency, count, "");
}

/* At most TURN of those that are busy go on. Returns how many answers they got, or how many bytes of a stream. */
static long long take_turn(double patience)
{
    struct epoll_event events[TURN];
    long long got = 0;
    int count = wait_for(events, TURN, patience);
    for (int i = 0; i < count; i++) {
        if (events[i].data.u64 >= (uint64_t)clients)
            continue; /* a new one: they have their own epoll */
        struct client *one = &all[events[i].data.u64];
        long long before = one->received;
        int ended = go_on(one, events[i].events);
        if (ended && one->to_receive < 0)
            fail("a stream without an end ended after %lld bytes", one->received);
        got += one->to_receive < 0 ? one->received - before : ended;
        if (ended)
            ask_again(one);
    }
    return got;
}

/* Let them be busy until they have got so much. Returns how much they have got then. */
static long long keep_busy(long long got, long long wanted)
{
    double deadline = now() + PATIENCE;
    while (got < wanted) {
        if (now() > deadline)
            fail("expected %lld answers or bytes for the busy ones, got %lld within %d s", wanted, got, PATIENCE);
        got += take_turn(1);
    }
    return got;
}

/* Whether a connection has sent something twice. */
static int sent_again(int fd)
{
    struct tcp_info info;
    socklen_t size = sizeof info;
    must(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size), "TCP_INFO");
    return info.tcpi_total_retrans > 0;
}

/*
 * New connections beside busy ones. Before the first of them, the busy ones have had WARM answers each, or WARM_BYTES.
 * New ones are looked at before each turn of the busy ones: how long these keep the load busy is not to be measured. The
 * busy ones go on until they have had ENOUGH each, or ENOUGH_BYTES.
 *
 * Latency is from connecting to the whole answer; who has none after PATIENCE has waited so long, and is not `answered`.
 * `again`: how many connections had to send something twice, as they must if the proxy's backlog is full. `others`: the
 * answers of the busy ones from the first to the end, or their bytes; `meanwhile`: how many a second while there were new
 * connections without an answer.
 */
static void beside(long count, int streams)
{
    enum { WARM = 50, WARM_BYTES = 8 << 20, ENOUGH = 70, ENOUGH_BYTES = 10 << 20 };
    struct epoll_event events[EVENTS];
    double *latency = calloc(count, sizeof *latency), *since = calloc(count, sizeof *since);
    struct client *new = all + clients;
    char text[256];
    open_all();
    if (streams)
        snprintf(request, REQUEST, "down %lld", INT64_MAX / 2LL);
    for (int i = 0; i < clients; i++) {
        all[i].to_receive = streams ? -1 : ANSWER;
        ask_again(&all[i]);
    }
    long long others = keep_busy(0, (long long)clients * (streams ? WARM_BYTES : WARM)), before = others;
    memset(request, ' ', REQUEST);
    memcpy(request, "ask", 3);
    int busy = epoll_fd, fresh = epoll_create1(0);
    watch(EPOLL_CTL_ADD, fresh, EPOLLIN, clients);
    double began = now(), ended = began;
    long started = 0, answered = 0, again = 0;
    while (answered < count && ended < began + PATIENCE) {
        epoll_fd = fresh;
        for (int i = 0; i < TURN && started < count; i++, started++) {
            new[started].to_receive = ANSWER;
            since[started] = now();
            start(&new[started]);
        }
        int ready = wait_for(events, EVENTS, 0);
        for (int i = 0; i < ready; i++) {
            struct client *one = &all[events[i].data.u64];
            if (!go_on(one, events[i].events))
                continue;
            latency[one - new] = now() - since[one - new];
            answered++;
            again += sent_again(one->fd);
            close(one->fd);
        }
        ended = now();
        epoll_fd = busy;
        if (answered < count)
            others += take_turn(started < count ? 0 : 1);
    }
    double rate = (others - before) / (ended - began);
    for (int i = 0; i < started; i++) {
        if (latency[i])
            continue;
        latency[i] = PATIENCE;
        again += sent_again(new[i].fd);
        close(new[i].fd);
    }
    others = keep_busy(others, (long long)clients * (streams ? ENOUGH_BYTES : ENOUGH));
    snprintf(text, sizeof text, ", \"answered\": %ld, \"again\": %ld, \"meanwhile\": %.3f, \"others\": %lld", answered,
             again, rate, others);
    report_latencies(ended - began, latency, count, text);
}

static int checked_size(long size)
{
    if (size < 1 || size > REQUEST_MAX)
        fail("expected a request of 1 to %d bytes, got %ld", REQUEST_MAX, size);
    return size;
}

static void request_from(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        fail("%s: %s", path, strerror(errno));
    request_size = checked_size(fread(request, 1, REQUEST_MAX, file));
    fclose(file);
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    must(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    must(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
    epoll_fd = epoll_create1(0);
    memset(chunk, 'x', CHUNK);
    memset(request, ' ', REQUEST);
    const char *mode = argc > 2 ? argv[1] : "";
    if (!strcmp(mode, "backend")) {
        if (argc > 3)
            request_size = checked_size(atol(argv[3]));
        return backend(atoi(argv[2]));
    }
    if (argc < 4)
        fail("expected a subcommand, a port and counts, see the top of load.c");
    port = atoi(argv[2]);
    long long count = atoll(argv[3]);
    clients = !strcmp(mode, "hold") ? count : argc > 4 ? atoi(argv[4]) : 1;
    int is_beside = !strncmp(mode, "beside", 6);
    all = calloc(clients + (is_beside ? count : 0), sizeof *all);
    if (!strcmp(mode, "down") || !strcmp(mode, "up")) {
        bulk(mode[0] == 'd', count);
        return 0;
    }
    memcpy(request, "ask", 3);
    for (int i = 0; i < clients; i++)
        all[i].to_receive = ANSWER;
    double began = now();
    if (!strcmp(mode, "connections")) {
        if (argc > 5)
            request_from(argv[5]);
        for (int i = 0; i < clients; i++)
            start(&all[i]);
        answers(count, reconnect, clients);
        report(now() - began, "");
    } else if (!strcmp(mode, "requests")) {
        open_all();
        began = now();
        for (int i = 0; i < clients; i++)
            ask_again(&all[i]);
        answers(count, ask_again, clients);
        report(now() - began, "");
    } else if (!strcmp(mode, "rate") && argc > 5) {
        rate(count, atof(argv[5]));
    } else if (is_beside) {
        beside(count, !strcmp(mode, "beside-down"));
    } else if (!strcmp(mode, "hold")) {
        open_all();
        report(now() - began, "");
        while (read(STDIN_FILENO, waste, CHUNK) > 0)
            ;
    } else {
        fail("unknown subcommand %s, see the top of load.c", mode);
    }
    return 0;
}
