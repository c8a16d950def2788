/*
 * A service that publishes orders over NATS: each line of its input is one, and it answers each with a line.
 *
 *     service URL            the client library's own limits for reconnecting: 60 times, 2 s apart
 *     service URL forever    limits that outlive any outage
 */
#include <nats/nats.h>
#include <stdio.h>
#include <string.h>

enum { FLUSH_MS = 2000, RECONNECT_WAIT_MS = 250 };

static void tell(natsConnection *connection, void *what)
{
    (void)connection;
    puts(what);
}

/* Tries for ever and often, and spreads the clients of a broker that comes back. */
static natsStatus outlive_any_outage(natsOptions *options)
{
    natsStatus status = natsOptions_SetMaxReconnect(options, -1);
    if (status == NATS_OK)
        status = natsOptions_SetReconnectWait(options, RECONNECT_WAIT_MS);
    if (status == NATS_OK)
        status = natsOptions_SetReconnectJitter(options, RECONNECT_WAIT_MS, RECONNECT_WAIT_MS);
    return status;
}

static natsStatus prepare(natsOptions *options, const char *url, int forever)
{
    natsStatus status = natsOptions_SetURL(options, url);
    if (status == NATS_OK)
        status = natsOptions_SetDisconnectedCB(options, tell, "disconnected");
    if (status == NATS_OK)
        status = natsOptions_SetReconnectedCB(options, tell, "reconnected");
    if (status == NATS_OK)
        status = natsOptions_SetClosedCB(options, tell, "closed");
    if (status == NATS_OK && forever)
        status = outlive_any_outage(options);
    return status;
}

/* Publishes an order, and knows that the broker has it. */
static natsStatus publish(natsConnection *connection, const char *order)
{
    natsStatus status = natsConnection_PublishString(connection, "orders", order);
    if (status == NATS_OK)
        status = natsConnection_FlushTimeout(connection, FLUSH_MS);
    return status;
}

static void serve(natsConnection *connection)
{
    char order[256];
    while (fgets(order, sizeof order, stdin) != NULL) {
        order[strcspn(order, "\n")] = '\0';
        natsStatus status = publish(connection, order);
        if (status == NATS_OK)
            printf("published %s\n", order);
        else
            printf("failed %s: %s\n", order, natsStatus_GetText(status));
    }
}

int main(int count, char **words)
{
    int forever = count == 3 && strcmp(words[2], "forever") == 0;
    natsConnection *connection = NULL;
    natsOptions *options = NULL;
    if (count < 2 || (count == 3 && !forever) || count > 3) {
        fputs("usage: service URL [forever]\n", stderr);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    natsStatus status = natsOptions_Create(&options);
    if (status == NATS_OK)
        status = prepare(options, words[1], forever);
    if (status == NATS_OK)
        status = natsConnection_Connect(&connection, options);
    if (status == NATS_OK) {
        puts("connected");
        serve(connection);
    } else {
        fprintf(stderr, "service: %s: %s\n", words[1], natsStatus_GetText(status));
    }
    natsConnection_Destroy(connection);
    natsOptions_Destroy(options);
    nats_Close();
    return status == NATS_OK ? 0 : 1;
}
