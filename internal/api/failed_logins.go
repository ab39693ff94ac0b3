package api

import (
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// failedLoginInterval is how often the alert FAILED_LOGIN_ATTEMPTS tells of
// refused logins, when there are any. It is xapi's.
const failedLoginInterval = time.Hour

// tellFailedLogins raises the alert about refused logins until the API closes.
// What has been counted by then is in the log.
func (a *API) tellFailedLogins() {
	for {
		timer := time.NewTimer(failedLoginInterval)
		select {
		case <-a.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		body := a.refused.Take()
		if body == "" {
			continue
		}
		err := a.db.Update(a.ctx, func(tx *db.Tx) error {
			_, pool, err := a.pool(tx)
			if err != nil {
				return err
			}
			return a.alert(tx, "FAILED_LOGIN_ATTEMPTS", xapi.ClsPool, pool.UUID, body)
		})
		if err != nil && a.ctx.Err() == nil {
			a.log.Error("an alert could not be raised", "alert", "FAILED_LOGIN_ATTEMPTS", "body", body, "err", err)
		}
	}
}
